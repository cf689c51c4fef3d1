"""Trains tiny models on synthetic data in any parallel layout, and gathers the results for comparison.

Sample `i` of global batch `k` does not depend on the parallel layout; each data-parallel rank takes the samples that
the real sampler would give it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision, TrainingConfig
from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.platform.process_groups import initialize
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Batch, Family

VOCAB_SIZE = 96
GLOBAL_BATCH_SIZE = 4

CONSTANT = OptimizerSettings(
    lr=5e-3,
    weight_decay=0.1,
    lr_decay_style="constant",
    # In fp16 the loss scale soon rises, from a value at which no gradient of the tiny models overflows.
    initial_loss_scale=2.0**6,
    loss_scale_window=2,
    hysteresis=1,
)

TINY = ModelConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    seq_length=16,
    swiglu=True,
    disable_bias_linear=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
"""A Llama-like model whose sizes can be divided among the ranks of every layout of up to four processes."""

LAYOUTS: dict[str, ParallelConfig] = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor_model_parallel_size=2),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "PP2 interleaved": ParallelConfig(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1
    ),
    "TP2xPP2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "DP2": ParallelConfig(),
    "DP2 distributed optimizer": ParallelConfig(use_distributed_optimizer=True),
    "TP2+SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}
"""Layouts, by name, whose training results must equal those of a single process."""

WORLD_SIZES = {name: 4 if name == "TP2xPP2" else 1 if name == "TP1" else 2 for name in LAYOUTS}

CONTEXT_LAYOUTS: dict[str, tuple[ParallelConfig, int]] = {
    "CP2": (ParallelConfig(context_parallel_size=2), 2),
    "CP4": (ParallelConfig(context_parallel_size=4), 4),
    "TP2+SPxCP2": (replace(LAYOUTS["TP2+SP"], context_parallel_size=2), 4),
    "PP2xCP2": (replace(LAYOUTS["PP2"], context_parallel_size=2), 4),
    "PP2xCP2 interleaved": (replace(LAYOUTS["PP2 interleaved"], context_parallel_size=2), 4),
    "DP2xCP2": (ParallelConfig(context_parallel_size=2), 4),
    "DP2xCP2 distributed optimizer": (
        replace(LAYOUTS["DP2 distributed optimizer"], context_parallel_size=2),
        4,
    ),
}
"""Layouts that divide sequences, with their numbers of processes."""


def with_full_recompute(parallel: ParallelConfig) -> ParallelConfig:
    """Returns the same layout, but with every layer recomputed in the backward pass."""
    return replace(parallel, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


@dataclass
class TrainingTrace:
    """Results of a short training run, for comparison between layouts."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    layer_losses: list[dict[str, float]] = field(default_factory=list)
    first_gradients: list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]] = field(
        default_factory=list
    )
    """This rank's gradient shards from the first step, each as (global name, global shape, offset, values)."""

    statistics: dict[str, float] = field(default_factory=dict)
    """Statistics of the model families by name, each from the last step that computed it."""


def synthetic_batches(
    sequence_length: int, micro_batch_size: int = 1, global_batch_size: int = GLOBAL_BATCH_SIZE
) -> Iterator[Batch]:
    """Yields micro-batches without end for this data-parallel rank.

    In every sequence, each second token is determined by the token before it.
    """
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    step = 0
    while True:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, VOCAB_SIZE, (global_batch_size, sequence_length + 1), generator=generator)
        tokens[:, 1::2] = (tokens[:, 0:-1:2] * 7 + 3) % VOCAB_SIZE
        for samples in tokens.split(micro_batch_size)[rank::size]:
            yield {
                "tokens": samples[:, :-1].contiguous(),
                "labels": samples[:, 1:].contiguous(),
                "loss_mask": torch.ones(micro_batch_size, sequence_length),
                "position_ids": torch.arange(sequence_length).expand(micro_batch_size, -1),
            }
        step += 1


def train_tiny(
    parallel: ParallelConfig,
    steps: int,
    make_families: Callable[[], list[Family]] = list,
    model: ModelConfig = TINY,
    precision: Precision = "fp32",
    settings: OptimizerSettings = CONSTANT,
) -> TrainingTrace:
    """Trains `model` for `steps` steps; call it in every process of the layout.

    Args:
        parallel: the parallel layout.
        steps: optimizer steps, each with a global batch of 4 sequences.
        make_families: module-level function that returns the model families to build the model with.
        model: configuration of the base model.
        precision: precision of parameters and activations.
        settings: the optimizer's settings.
    """
    return train_and_keep(parallel, steps, make_families, model, precision, settings)[0]


def train_and_keep(
    parallel: ParallelConfig,
    steps: int,
    make_families: Callable[[], list[Family]],
    model: ModelConfig,
    precision: Precision,
    settings: OptimizerSettings,
    micro_batch_size: int = 1,
    examine: Callable[[list[GPTModel]], Any] | None = None,
) -> tuple[TrainingTrace, list[GPTModel], Any]:
    """Trains like `train_tiny`; also returns this rank's trained model chunks, and the result of `examine` for them.

    `examine` is called before training, and must not change the model.
    """
    initialize(parallel, seed=1)
    families = make_families()
    extensions = [family.extension() for family in families]
    chunks = build_model(
        model,
        parallel,
        vocab_size=VOCAB_SIZE,
        seed=1,
        precision=precision,
        extensions=extensions,
        fuses_norms=True,
    )
    for family in families:
        family.prepare_model(chunks)
    examined = examine(chunks) if examine is not None else None
    wrapped = wrap_model(chunks, parallel, precision=precision)
    optimizer = build_optimizer(settings, parallel, wrapped, families, precision=precision)
    scheduler = build_scheduler(settings, TrainingConfig(train_iters=steps), optimizer, GLOBAL_BATCH_SIZE)
    stepper = Stepper(
        wrapped,
        families,
        optimizer,
        scheduler,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=micro_batch_size,
        clip_grad=1.0,
    )
    batches = synthetic_batches(model.seq_length, micro_batch_size)
    trace = TrainingTrace()
    for iteration in range(1, steps + 1):
        result = stepper.train(batches, iteration)
        trace.losses.append(result.loss)
        trace.grad_norms.append(result.grad_norm)
        trace.layer_losses.append(result.layer_losses)
        trace.statistics |= result.statistics
        if iteration == 1 and not parallel.use_distributed_optimizer:
            trace.first_gradients = local_gradients(chunks, result.grad_norm, clip=1.0)
    return trace, chunks, examined


def local_gradients(
    chunks: list[GPTModel], grad_norm: float, clip: float
) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Returns this rank's gradient shards before clipping, each as (global name, global shape, offset, values).

    Args:
        chunks: this rank's model chunks, unwrapped.
        grad_norm: gradient norm of the step, before clipping.
        clip: largest gradient norm; larger gradients were scaled down to it.
    """
    undo = max(1.0, (grad_norm + 1.0e-6) / clip)  # the inverse of the clipping coefficient
    found = []
    for chunk in chunks:
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values():
            for parameter, shards in _parameter_shards(value):
                gradient = getattr(parameter, "main_grad", None)
                if gradient is None:
                    continue
                if gradient.dtype == torch.float32:
                    gradient = gradient * undo
                else:  # the optimizer has unscaled and clipped a copy
                    gradient = gradient.float() / LayerLosses.loss_scale
                rows = getattr(parameter, "gradient_rows", None)
                if rows is not None:
                    gradient = torch.zeros(parameter.shape).index_copy_(0, rows, gradient)
                pieces = (
                    gradient.split([s.data.shape[0] for s in shards], dim=0)
                    if len(shards) > 1
                    else [gradient]
                )
                for shard, piece in zip(shards, pieces, strict=True):
                    found.append((shard.key, shard.global_shape, shard.global_offset, piece.detach().clone()))
    return found


def _parameter_shards(value: object) -> Iterator[tuple[torch.Tensor, list[ShardedTensor]]]:
    if isinstance(value, ShardedTensor) and isinstance(value.data, torch.nn.Parameter):
        yield value.data, [value]
    elif isinstance(value, ShardedTensorFactory):
        pieces = value.build()
        yield value.data, list(pieces.values()) if isinstance(pieces, dict) else list(pieces)


def assemble(traces: list[TrainingTrace]) -> dict[str, torch.Tensor]:
    """Joins all ranks' gradient shards; returns unsharded gradients by global name (NaN where a shard is missing)."""
    full: dict[str, torch.Tensor] = {}
    for trace in traces:
        for key, shape, offset, values in trace.first_gradients:
            target = full.setdefault(key, torch.full(shape, float("nan")))
            target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return full
