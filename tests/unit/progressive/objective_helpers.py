"""A family for tests with an objective, a time embedding and an activation cache, and tiny data that can be learned."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision, TrainingConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.gpt_model import HIDDEN_STATES, GPTModel
from megatron_ext.models.model_extension import Extension, StageInfo
from megatron_ext.platform.process_groups import initialize
from megatron_ext.progressive.cache.activation_cache import ActivationCache
from megatron_ext.progressive.cache.frozen_trunk import trunk_tensors, without_dropout
from megatron_ext.progressive.objectives.stack_objective import StackObjective
from megatron_ext.progressive.objectives.time_embedding import TimeEmbedding, time_embedding
from megatron_ext.progressive.objectives.time_steps import TIME_STEP
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.output_losses import OutputLoss

MASK = VOCAB_SIZE - 1
"""Never among the data's tokens."""

MODEL = replace(TINY, init_method_std=0.1, untie_embeddings_and_output_weights=True)
MLM = ProgressiveConfig(training_objective="mlm", max_stacks=2, time_embedding_dim=8)
GLOBAL_BATCH_SIZE = 4


class ObjectiveExtension(Extension):
    """Attention and time embedding as the objective wants them."""

    name = "objective"

    def __init__(self, objective: StackObjective) -> None:
        self.objective = objective
        self.bidirectional = objective.bidirectional

    def stage_module(
        self, config: TransformerConfig, stage: StageInfo, pg_collection: ProcessGroupCollection
    ) -> TimeEmbedding | None:
        return time_embedding(config, self.objective.config, stage) if self.objective.embeds_time else None


class ObjectiveFamily(Family):
    """The wiring that `ProgressiveFamily` has, without stacks."""

    name = "objective"

    def __init__(
        self,
        config: ProgressiveConfig,
        *,
        trunk_layers: int = 0,
        cached: bool = False,
        mask_seed: int = 1,
        identity: dict[str, Any] | None = None,
    ) -> None:
        masks = config.training_objective in ("mlm", "diffusion")
        self.objective = StackObjective(
            config,
            stack_idx=1 if trunk_layers else 0,
            seed=mask_seed,
            mask_token_id=MASK if masks else None,
            fixed_masks=trunk_layers > 0,
        )
        self.trunk_layers = trunk_layers
        self.cache = (
            ActivationCache(config, trunk_layers=trunk_layers, identity=identity or {}) if cached else None
        )

    def extension(self) -> ObjectiveExtension:
        return ObjectiveExtension(self.objective)

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        for _, tensor in trunk_tensors(chunks, self.trunk_layers) if self.trunk_layers else ():
            if tensor.is_floating_point():
                tensor.requires_grad_(False)

    def make_batch(self, batch: Batch) -> Batch:
        return self.objective.make_batch(batch)

    def auxiliary_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {name: batch[name] for name in (TIME_STEP, HIDDEN_STATES) if name in batch}

    def prepare_batches(
        self, chunks: list[GPTModel], families: list[Family], batches: list[Batch]
    ) -> Iterable[Batch]:
        if self.cache is not None:
            return self.cache.prepare(chunks, families, batches)
        without_dropout(chunks, self.trunk_layers)
        return batches

    def begin_step(self, chunks: list[GPTModel], iteration: int | None) -> None:
        if self.cache is not None and iteration is None:
            self.cache.release(chunks)

    def evaluation_loss(self) -> OutputLoss | None:
        return self.objective.evaluation_loss()


def batches(num_samples: int, *, first: int = 0, seed: int = 0, micro: int = 1) -> Iterator[Batch]:
    """Endless micro-batches of this data-parallel rank over `num_samples` sequences, epoch after epoch.

    After two tokens by which sequences differ, each has one of twelve tokens at its even places, and one that follows
    from it at the odd ones.
    """
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    length = MODEL.seq_length
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(12, 40, (num_samples, 1), generator=generator)
    rest = torch.randint(0, 12, (num_samples, 1), generator=generator).expand(-1, length // 2 - 1)
    half = torch.cat([start, rest], dim=1)
    tokens = torch.stack([half, half + 40], dim=2).flatten(1)
    place = first + rank * micro
    while True:
        rows = torch.arange(place, place + micro)
        yield {
            "tokens": tokens[rows % num_samples],
            "labels": tokens[rows % num_samples].roll(-1, 1),
            "loss_mask": torch.ones(micro, length),
            "position_ids": torch.arange(length).expand(micro, length),
            "epoch": rows // num_samples,
        }
        place += micro * copies


@dataclass
class Trained:
    """What a short training gave."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    values: list[dict[str, float]] = field(default_factory=list)
    """The cache's."""

    evaluation: dict[str, float] = field(default_factory=dict)


def build_stepper(
    parallel: ParallelConfig,
    family: ObjectiveFamily,
    model: ModelConfig = MODEL,
    lr: float = 5e-3,
    micro: int = 1,
    precision: Precision = "fp32",
) -> tuple[Stepper, list[GPTModel]]:
    """A model and what trains it; in every process of the layout."""
    initialize(parallel, seed=1)
    chunks = build_model(
        model,
        parallel,
        vocab_size=VOCAB_SIZE,
        seed=1,
        precision=precision,
        extensions=[family.extension()],
    )
    family.prepare_model(chunks)
    wrapped = wrap_model(chunks, parallel, precision=precision)
    settings = OptimizerSettings(lr=lr, lr_decay_style="constant", weight_decay=0.0)
    optimizer = build_optimizer(settings, parallel, wrapped, [family], precision=precision)
    scheduler = build_scheduler(settings, TrainingConfig(train_iters=100), optimizer, GLOBAL_BATCH_SIZE)
    stepper = Stepper(
        wrapped,
        [family],
        optimizer,
        scheduler,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=micro,
        clip_grad=1.0,
    )
    return stepper, chunks


def train(
    parallel: ParallelConfig,
    family: ObjectiveFamily,
    steps: int,
    *,
    num_samples: int = 8,
    model: ModelConfig = MODEL,
    first: int = 0,
    precision: Precision = "fp32",
) -> Trained:
    """Trains from the same initial weights; evaluates at the end."""
    stepper, _ = build_stepper(parallel, family, model, precision=precision)
    data = batches(num_samples, first=first)
    trained = Trained()
    for iteration in range(1, steps + 1):
        result = stepper.train(data, iteration)
        trained.losses.append(result.loss)
        trained.grad_norms.append(result.grad_norm)
        if family.cache is not None:
            trained.values.append(family.cache.values())
    trained.evaluation = stepper.evaluate(lambda: batches(num_samples), 1)
    if family.cache is not None:
        family.cache.close()
    return trained
