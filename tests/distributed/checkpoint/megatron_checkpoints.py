"""Tiny checkpoints as Megatron-LM writes them: the engine's own model, layer spec, optimizers and saving.

`save` does what Megatron-LM does at a save: the model's and the optimizer's sharded state dicts, the schedule's state
and the arguments go to `dist_checkpointing.save`, and the tracker names the step.
"""

import contextlib
import queue
import warnings
import zlib
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.tiny_training import GLOBAL_BATCH_SIZE, synthetic_batches
from megatron_ext.training.interface.family_interface import Batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # the engine imports a deprecated module of its own
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

LENGTH = 16
VOCABULARY = 97  # 96 numbers, and the end of a document
ROWS = 104  # of the embedding: the vocabulary, padded
STEPS = 3
RATES: dict[str, Any] = {
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lr_decay_style": "cosine",
    "lr_warmup_iters": 2,
    "train_iters": 10,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A combination of Megatron-LM's arguments, and how the checkpoint is written."""

    arguments: dict[str, Any] = field(default_factory=dict)
    local_names: bool = False
    """Whether norms are saved under the local spec's own names instead of Transformer Engine's."""

    numbered: bool = False
    """Whether every layer's tensors have names of their own, instead of one tensor for all layers."""

    release: bool = False
    precision: Precision = "fp32"

    needs_te: bool = False
    """Whether the engine computes it with Transformer Engine only; its processes must be able to import it."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    def all_arguments(self) -> dict[str, Any]:
        """Returns the arguments, with Megatron-LM's names and defaults."""
        return {**DEFAULTS, **self.arguments}


DEFAULTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": 8,
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "swiglu": True,
    "squared_relu": False,
    "bias_gelu_fusion": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.02,
    "make_vocab_size_divisible_by": 8,
    "padded_vocab_size": ROWS,
    "vocab_size": VOCABULARY - 1,  # as Megatron-LM counts for this tokenizer
    "tokenizer_type": "NullTokenizer",
    "tokenizer_model": None,
    "vocab_file": None,
    "merge_file": None,
    "attention_backend": AttnBackend.auto,
    "num_experts": None,
    "multi_latent_attention": False,
}

_GPT3 = {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
    "untie_embeddings_and_output_weights": False,
}
_CENTERED = {"layernorm_zero_centered_gamma": True}
_GROUPED = {"group_query_attention": True, "num_query_groups": 2}

CASES = {
    "Llama": Case(arguments=_GROUPED),
    "GPT-3": Case(arguments=_GPT3),
    "local names": Case(arguments={**_GPT3, "position_embedding_type": "rope"}, local_names=True),
    "numbered layers": Case(arguments={**_GROUPED, "kv_channels": 16}, numbered=True),
    "release": Case(arguments={"untie_embeddings_and_output_weights": False}, release=True),
    "squared ReLU": Case(arguments={"swiglu": False, "squared_relu": True}),
    "fused GELU": Case(arguments={**_GPT3, "bias_gelu_fusion": True}),
    "rope scaling": Case(arguments={"use_rope_scaling": True, "rotary_base": 500000, "rotary_percent": 0.5}),
    "query and key norms": Case(arguments={**_GROUPED, "qk_layernorm": True, "add_qkv_bias": True}),
    "LayerNorm without biases": Case(arguments={**_GROUPED, "normalization": "LayerNorm", "rotary_percent": 0.25}),
    "bf16": Case(arguments=_GROUPED, precision="bf16"),
    "fp16": Case(arguments=_GROUPED, precision="fp16"),
    "windows": Case(arguments={"window_size": (4, 0), "window_attn_skip_freq": [1, 0, 0, 1]}),
    "norms around 0": Case(arguments={**_GROUPED, **_CENTERED, "qk_layernorm": True}, needs_te=True),
    "LayerNorm around 0": Case(arguments={**_GPT3, **_CENTERED}, needs_te=True),
}  # fmt: skip


@contextlib.contextmanager
def _not_compiled() -> Iterator[None]:
    """Lets the engine call its functions as they are written: each process would compile them anew, for seconds."""
    with mock.patch.object(torch, "compile", lambda function: function):
        yield


@contextlib.contextmanager
def _queue_without_process() -> Iterator[None]:
    """Gives the engine the queue of a save that training waits for; its own is in a process that it starts for it."""
    with mock.patch.object(filesystem_async, "_results_queue", queue.Queue()):
        yield


class Run:
    """Megatron-LM's training of a case, on this process's ranks."""

    def __init__(self, case: Case, parallel: ParallelConfig, sharding: str | None = None) -> None:
        """Args:
        case: the model.
        parallel: the parallel layout.
        sharding: format in which the distributed optimizer saves; None for the optimizer that is not distributed.
        """
        self.case, self.parallel, self.sharding = case, parallel, sharding
        self.arguments = case.all_arguments()
        initialize(parallel, seed=1)
        self.config = engine_config(case, parallel)
        model = _model(self.config, self.arguments, case)
        randomize(model)
        distributed = sharding is not None
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        self.chunks = [DistributedDataParallel(self.config, ddp, model)]
        config = OptimizerConfig(
            lr=RATES["lr"], min_lr=RATES["min_lr"], weight_decay=0.1, clip_grad=1.0, bf16=self.config.bf16,
            fp16=self.config.fp16, params_dtype=self.config.params_dtype, use_distributed_optimizer=distributed,
            initial_loss_scale=2.0**6, loss_scale_window=2,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(
            config,
            self.chunks,
            config_overrides=get_standard_config_overrides(config),
            use_gloo_process_groups=False,
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self._batches = synthetic_batches(LENGTH)
        steps = RATES["train_iters"] * GLOBAL_BATCH_SIZE
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=RATES["lr"], min_lr=RATES["min_lr"],
            lr_warmup_steps=RATES["lr_warmup_iters"] * GLOBAL_BATCH_SIZE, lr_decay_steps=steps, lr_decay_style="cosine",
            start_wd=0.1, end_wd=0.1, wd_incr_steps=steps, wd_incr_style="constant",
        )  # fmt: skip

    def train(self, steps: int) -> list[float]:
        """Trains, and returns the loss of every step."""
        return [self._step() for _ in range(steps)]

    @_not_compiled()
    def _step(self) -> float:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        size = parallel_state.get_data_parallel_world_size()
        reduced = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=self._batches,
            model=self.chunks,
            num_microbatches=GLOBAL_BATCH_SIZE // size,
            seq_length=LENGTH,
            micro_batch_size=1,
        )
        finalize_model_grads(self.chunks)
        self.optimizer.step()
        self.scheduler.step(GLOBAL_BATCH_SIZE)
        total = torch.tensor([sum((float(part["loss"]) for part in reduced), 0.0), float(len(reduced))])
        torch.distributed.all_reduce(total)
        return float(total[0] / total[1])

    def save(self, folder: Path, iteration: int) -> None:
        """Writes the checkpoint, as Megatron-LM does."""
        target = folder / ("release" if self.case.release else f"iter_{iteration:07d}")
        if torch.distributed.get_rank() == 0:
            target.mkdir(parents=True)
        torch.distributed.barrier()
        metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if self.sharding is not None:
            metadata["distrib_optim_sharding_type"] = self.sharding
        if self.case.numbered:
            metadata["non_homogeneous_layers"] = True
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        state: dict[str, Any] = {
            "args": Namespace(
                **self.arguments,
                **RATES,
                iteration=iteration,
                consumed_train_samples=iteration * GLOBAL_BATCH_SIZE,
                global_batch_size=GLOBAL_BATCH_SIZE,
                micro_batch_size=1,
                bf16=self.config.bf16,
                fp16=self.config.fp16,
                optimizer="adam",
                tensor_model_parallel_size=self.parallel.tensor_model_parallel_size,
                pipeline_model_parallel_size=self.parallel.pipeline_model_parallel_size,
                params_dtype=self.config.params_dtype,
                use_distributed_optimizer=self.sharding is not None,
                weight_decay=0.1,
                lr_warmup_init=0.0,
            ),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "model": self.chunks[0].module.sharded_state_dict(metadata={**metadata, **groups}),
        }
        state["optimizer"] = self.optimizer.sharded_state_dict(state, metadata={**metadata, **groups})
        state["opt_param_scheduler"] = self.scheduler.state_dict()
        with warnings.catch_warnings(), _queue_without_process():
            warnings.simplefilter("ignore")
            dist_checkpointing.save(state, str(target), content_metadata=metadata)
        if torch.distributed.get_rank() == 0:
            name = "release" if self.case.release else str(iteration)
            (folder / "latest_checkpointed_iteration.txt").write_text(name)
        torch.distributed.barrier()

    def load(self, folder: Path) -> None:
        """Loads the model of a checkpoint, with the engine's reader, as Megatron-LM does."""
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        content = dist_checkpointing.load_content_metadata(str(folder)) or {}
        model = self.chunks[0].module
        state = {"model": model.sharded_state_dict(metadata={**content, **groups})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"])

    def resume(self, folder: Path) -> None:
        """Loads model, optimizer and schedule with the engine's reader, as Megatron-LM does, and skips the data."""
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        metadata = {**dist_checkpointing.load_content_metadata(str(folder)), **groups}
        model = self.chunks[0].module
        state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = dist_checkpointing.load(state, str(folder))
        model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        size = parallel_state.get_data_parallel_world_size()
        for _ in range(loaded["args"].consumed_train_samples // size):
            next(self._batches)

    @_not_compiled()
    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Returns the logits [2, LENGTH, ROWS] of a model in one process."""
        model = self.chunks[0].module.eval()
        tokens = token_ids()
        position_ids = torch.arange(LENGTH).expand_as(tokens)
        result: torch.Tensor = model(tokens, position_ids, None)
        return result.float()


def token_ids() -> torch.Tensor:
    """Returns token ids, [2, LENGTH]."""
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def randomize(model: GPTModel) -> None:
    """Makes every parameter random, norms and biases included; padded rows of the vocabulary too."""
    tied = {"output_layer.weight": "embedding.word_embeddings.weight"}  # the last stage's copy of the first's
    for name, parameter in model.named_parameters():
        source = tied.get(name, name) if model.share_embeddings_and_output_weights else name
        # The engine's own stream differs between data-parallel ranks.
        generator = torch.Generator().manual_seed(zlib.crc32(source.encode()))
        parameter.normal_(0.0, 0.1, generator=generator)
        # In Transformer Engine's layers: layer_norm_weight.
        is_norm = "norm" in name and name.endswith("weight")
        parameter.add_(float(is_norm and not model.config.layernorm_zero_centered_gamma))


def engine_config(case: Case, parallel: ParallelConfig) -> TransformerConfig:
    """Returns the engine's configuration of a case, as Megatron-LM builds it."""
    given = case.all_arguments()
    names = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization",
        "layernorm_epsilon", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "hidden_dropout", "attention_dropout",
        "init_method_std", "layernorm_zero_centered_gamma", "window_size", "window_attn_skip_freq",
    )  # fmt: skip
    return TransformerConfig(
        **{name: given[name] for name in names},
        num_query_groups=given["num_query_groups"] if given["group_query_attention"] else None,
        gated_linear_unit=given["swiglu"],
        activation_func=F.silu if given["swiglu"] else squared_relu if given["squared_relu"] else F.gelu,
        bias_activation_fusion=given["bias_gelu_fusion"],
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        bf16=case.precision == "bf16",
        fp16=case.precision == "fp16",
        batch_p2p_comm=False,
        cuda_graph_scope=[],
    )


def _spec(case: Case) -> ModuleSpec:
    given = case.all_arguments()
    local = get_gpt_layer_local_spec(qk_layernorm=given["qk_layernorm"], normalization=given["normalization"])
    if not case.needs_te:
        return local
    spec: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=given["qk_layernorm"])
    attention = spec.submodules.self_attention.submodules
    # Transformer Engine's attention needs a GPU.
    attention.core_attention = local.submodules.self_attention.submodules.core_attention
    return spec


def _model(config: TransformerConfig, given: dict[str, Any], case: Case) -> GPTModel:
    spec = _spec(case)
    if case.local_names:
        spec.submodules.sharded_state_dict_keys_map = {}
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=given["padded_vocab_size"],
        max_sequence_length=given["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not given["untie_embeddings_and_output_weights"],
        position_embedding_type=given["position_embedding_type"],
        rotary_percent=given["rotary_percent"],
        rotary_base=given["rotary_base"],
        rope_scaling=given["use_rope_scaling"],
    ).to(config.params_dtype)


def _forward_step(data: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = losses.float().mean()
        return mean, {"loss": mean.detach().clone()}  # the engine scales it in place

    return output, loss
