"""A tiny training run that can be saved and loaded in any parallel layout, for tests of checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import Precision, TrainingConfig
from megatron_ext.config.serialize import group_to_dict
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.tiny_training import GLOBAL_BATCH_SIZE, TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.checkpoint.checkpoint_tensors import without_reader_warnings
from megatron_ext.training.checkpoint.checkpointer import Checkpointer, TrainingProgress
from megatron_ext.training.engine.data_parallel import wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Family

TINY_WITH_DROPOUT = replace(TINY, hidden_dropout=0.1, attention_dropout=0.1)
"""The tiny model with dropout. Each step draws random numbers from the stream that tensor-parallel ranks share and from
the rank's own stream.
"""

SCHEDULE = OptimizerSettings(
    lr=1e-2, min_lr=1e-3, weight_decay=0.1, lr_decay_style="cosine", lr_warmup_iters=2
)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Configuration of a `TinyRun`; picklable, so that it can be passed to other processes."""

    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    model: ModelConfig = TINY
    optimizer: OptimizerSettings = SCHEDULE
    precision: Precision = "fp32"
    micro_batch_size: int = 1
    """Sequences in a micro-batch; a global batch has four. With 2, a step takes half the time that it takes with 1."""

    vocab_size: int = VOCAB_SIZE
    tokenizer: str = "numbers"
    """Fingerprint of the tokenizer, which checkpoints record."""

    tokenizer_config: TokenizerConfig | None = None
    """Tokenizer to record in checkpoints for `inference.load_model`; if given, `tokenizer` must be its fingerprint."""

    make_families: Callable[[], list[Family]] = list


class TinyRun:
    """A tiny training run, created by every process of the layout; loads the checkpoint that the settings name."""

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.messages: list[str] = []
        self.loss_scales: list[float | None] = []
        parallel, families = settings.parallel, settings.make_families()
        precision = settings.precision
        initialize(parallel, seed=1)
        self.chunks = build_model(
            settings.model,
            parallel,
            vocab_size=settings.vocab_size,
            seed=1,
            precision=precision,
            extensions=[family.extension() for family in families],
            fuses_norms=True,
        )
        for family in families:
            family.prepare_model(self.chunks)
        wrapped = wrap_model(self.chunks, parallel, precision=precision)
        self.optimizer = build_optimizer(settings.optimizer, parallel, wrapped, families, precision=precision)
        training = TrainingConfig(train_iters=10, bf16=precision == "bf16", fp16=precision == "fp16")
        self.scheduler = build_scheduler(settings.optimizer, training, self.optimizer, GLOBAL_BATCH_SIZE)
        self.stepper = Stepper(
            wrapped,
            families,
            self.optimizer,
            self.scheduler,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=settings.micro_batch_size,
            clip_grad=1.0,
        )
        run_config = {
            "model": group_to_dict(settings.model),
            "training": group_to_dict(training),
            "optimizer": group_to_dict(settings.optimizer),
        }
        if settings.tokenizer_config is not None:
            run_config["tokenizer"] = group_to_dict(settings.tokenizer_config)
        self.checkpointer = Checkpointer(
            settings.checkpoint,
            chunks=list(wrapped),
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            run_config={
                **run_config,
                "vocab_size": settings.vocab_size,
                "tokenizer_fingerprint": settings.tokenizer,
            },
            families=families,
            message=self.messages.append,
        )
        self.progress = self.checkpointer.load() or TrainingProgress()
        self._batches = synthetic_batches(settings.model.seq_length, settings.micro_batch_size)
        samples_at_once = settings.micro_batch_size * parallel_state.get_data_parallel_world_size()
        for _ in range(self.progress.consumed_samples // samples_at_once):
            next(self._batches)

    def train(self, steps: int) -> list[float]:
        """Trains for `steps` steps and returns the loss of each step."""
        losses = []
        for _ in range(steps):
            self.progress.iteration += 1
            result = self.stepper.train(self._batches, self.progress.iteration)
            losses.append(result.loss)
            self.loss_scales.append(result.loss_scale)
            self.progress.consumed_samples += GLOBAL_BATCH_SIZE
        return losses

    def save(self) -> Path:
        """Saves a checkpoint and returns its directory."""
        return self.checkpointer.save(self.progress)


def read_plain(folder: str) -> dict[str, torch.Tensor]:
    """Reads all tensors of a checkpoint, unsharded, with megatron-core's own reader; needs a process group."""
    with without_reader_warnings():
        return dist_checkpointing.load_plain_tensors(folder)
