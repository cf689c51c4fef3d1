"""The configuration of a training run: a frozen tree of groups. A family's own subclass adds the family's groups."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from megatron_ext.config.command_line.merge import Source, name_yaml
from megatron_ext.config.cross_checks import validate
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig

C = TypeVar("C", bound="RunConfig")
"""The configuration of some family's run."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that a training run is told. A change is a new configuration, made with `dataclasses.replace`."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig
    optimizer: OptimizerSettings
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    sources: Mapping[str, Source] = field(default_factory=dict, repr=False, compare=False)
    """Field's name -> where its value came from, for all that do not have their default; no group."""

    def resolved(self: C, world_size: int, *, epoch_samples: int | None = None) -> C:
        """Returns the configuration as it trains, its groups checked against each other.

        A length in epochs becomes a number of steps. Other sizes that follow from several fields stay properties of
        their group (`resolved_...`), so that a checkpoint's `run_config.json` says what was given.

        Args:
            world_size: number of processes.
            epoch_samples: sequences in the training data, where the length is in epochs.

        Raises:
            ValueError: two groups contradict each other, or the processes do not divide.
        """
        try:
            training = self.training
            if training.num_epochs is not None and epoch_samples is not None:
                training = training.with_epochs(epoch_samples, self.parallel.data_parallel_size(world_size))
            validate(self.model, self.parallel, training, self.optimizer, self.data, world_size=world_size)
        except ValueError as error:
            raise ValueError(name_yaml(str(error), self.sources)) from None
        return dataclasses.replace(self, training=training)
