"""`ProgressiveTrainer` of the Python API: grows and trains a rack (a model built from stacks) on the caller's batches.

    trainer = ProgressiveTrainer(config)
    results = trainer.train_rack(rack_builder=builder, dataloader=dataloader, target_stacks=6)
    rack = builder.build_rack()

Phases, checkpoints and files are the same as with `pretrain_progressive.py` (see `progressive_run`). With a `save`
directory, an interrupted training run can be resumed. Source: docs/design/progressive_growth.md.
"""

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.platform import process_groups
from megatron_ext.platform.collectives import on_first_rank
from megatron_ext.progressive.growth.phases import check_phases, list_phases
from megatron_ext.progressive.objectives.progressive_batches import plain_batch
from megatron_ext.progressive.progressive_family import Trunk
from megatron_ext.progressive.runs.progressive_run import Growth
from megatron_ext.progressive.runs.rack_builder import ProgressiveRackBuilder
from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig
from megatron_ext.progressive.settings.stackwise_config import StackWiseConfig
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.run_lock import run_lock
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.loop import Data


@dataclass(frozen=True, kw_only=True)
class StackResult:
    """The results of one phase."""

    name: str
    """Name of the phase: `progressive_stack_{i}`, `progressive_joint` or `progressive_end_to_end`."""

    losses: list[float]
    """Losses of the steps that this call of `train_rack` has run."""

    iterations: int
    """Number of steps at the end of the phase, counted over all phases."""

    trainable_parameters: int
    frozen_parameters: int
    seconds: float
    """Wall time of the phase."""


@dataclass(frozen=True, kw_only=True)
class TrainingResults:
    """The results of a training run."""

    stacks: list[StackResult]
    """Results of the phases, in order."""

    checkpoint: Path
    """Directory of the last phase's checkpoint."""


class ProgressiveTrainer:
    """Grows and trains racks on the batches of a data loader."""

    def __init__(
        self,
        config: StackWiseConfig,
        *,
        save: str | Path | None = None,
        logging: LoggingConfig | None = None,
    ) -> None:
        """Args:
        config: the configuration; it may be changed until training begins.
        save: directory of the checkpoints; None for a temporary directory, which is removed when the process ends.
        logging: the logging flags; None for their defaults, but without --log-throughput.

        Raises:
            ValueError: the configuration is invalid; see `StackWiseConfig.validate`.
        """
        config.validate()
        self.config = config
        self.logging = logging or LoggingConfig(log_throughput=False)
        if save is None:
            save = tempfile.mkdtemp(prefix="progressive_")
            atexit.register(shutil.rmtree, save, ignore_errors=True)
        self.save = Path(save)

    def train_rack(
        self, rack_builder: ProgressiveRackBuilder, dataloader: Iterable[Any], target_stacks: int
    ) -> TrainingResults:
        """Trains the builder's stacks one after the other, adding stacks up to `target_stacks`. Collective.

        Args:
            rack_builder: describes the stacks; afterwards its `build_rack` returns the trained model.
            dataloader: yields the batches of this data-parallel rank, all of the same size; it is iterated several
                times. For the format of a batch see `ProgressiveDataLoader`.
            target_stacks: number of stacks of the complete model.

        Raises:
            ValueError: the rack already has more stacks, the directory contains another training run, or a batch has an
                unsupported format.
        """
        if target_stacks < rack_builder.num_stacks:
            raise ValueError(
                f"target_stacks {target_stacks}: must be at least {rack_builder.num_stacks}, the "
                "rack's current number of stacks"
            )
        while rack_builder.num_stacks < target_stacks:
            rack_builder.add_stack()
        config = self._run_config(rack_builder, dataloader, target_stacks)
        process_groups.initialize(config.parallel, config.training.seed)
        save = Path(on_first_rank(lambda: str(self.save)))
        config = replace(config, checkpoint=CheckpointConfig(save=str(save)))
        copies = parallel_state.get_data_parallel_world_size()
        phases = list_phases(
            config.progressive,
            config.training,
            config.optimizer,
            sizes=config.training.batch_sizes(config.training.resolved_global_batch_size(copies)),
            sequence_length=config.model.seq_length,
            rack=rack_builder.rack,
        )
        check_phases(config, phases, process_groups.world_size())
        batches = partial(_endless, dataloader, config.training.micro_batch_size, copies)
        with run_lock(str(save)):
            growth = Growth(
                config,
                phases,
                build_tokenizer(config.tokenizer),
                data=Data(train=batches, valid=None, test=None),
                frozen=rack_builder.frozen,
            )
            growth.run()
        last = phases[-1]
        folder = on_first_rank(lambda: find_checkpoint(str(save / last.name)))
        assert folder is not None
        rack_builder.trained = Trunk(folder=folder.resolve(), rack=last.rack, trains=last.trains)
        return TrainingResults(stacks=_stack_results(growth), checkpoint=folder)

    def train_progressively(
        self, rack_builder: ProgressiveRackBuilder, dataloader: Iterable[Any], target_stacks: int
    ) -> TrainingResults:
        """Does the same as `train_rack`; this is its name in docs/design/progressive_growth.md."""
        return self.train_rack(rack_builder, dataloader, target_stacks)

    def _run_config(
        self, builder: ProgressiveRackBuilder, dataloader: Iterable[Any], target_stacks: int
    ) -> ProgressiveRunConfig:
        config = self.config.run_config(target_stacks)
        first = plain_batch(next(iter(dataloader)))["tokens"]
        if first.size(1) > config.model.seq_length:
            raise ValueError(
                f"model.seq_length {config.model.seq_length}: must be at least {first.size(1)}, the length of the "
                "loader's sequences"
            )
        return replace(
            config,
            model=replace(config.model, num_layers=builder.rack.num_layers, seq_length=first.size(1)),
            training=replace(config.training, micro_batch_size=first.size(0)),
            logging=self.logging,
        )


def _endless(
    dataloader: Iterable[Any], micro_batch_size: int, copies: int, consumed_samples: int
) -> Iterator[Batch]:
    """Yields the loader's batches endlessly, each with its `epoch` [b]; skips the first `consumed_samples`."""
    return islice(
        _epochs(dataloader, micro_batch_size), consumed_samples // (micro_batch_size * copies), None
    )


def _epochs(dataloader: Iterable[Any], micro_batch_size: int) -> Iterator[Batch]:
    for epoch in count():
        empty = True
        for batch in map(plain_batch, dataloader):
            rows = batch["tokens"].size(0)
            if rows != micro_batch_size:
                raise ValueError(f"batch size changed from {micro_batch_size} to {rows}; use drop_last=True")
            empty = False
            yield {"epoch": torch.full((rows,), epoch), **batch}
        if empty:
            raise ValueError(
                "the data loader yields no batch; if it is a generator, which can be read only once, pass a list"
            )


def _stack_results(growth: Growth) -> list[StackResult]:
    return [
        StackResult(
            name=phase.name,
            losses=growth.losses.get(phase.name, []),
            iterations=phase.iteration,
            trainable_parameters=phase.trainable_parameters,
            frozen_parameters=phase.frozen_parameters,
            seconds=phase.seconds,
        )
        for phase in growth.history.finished
    ]
