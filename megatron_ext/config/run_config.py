"""The configuration of a training run: a frozen tree of config groups. A family's subclass adds the family's groups."""

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
"""`RunConfig` or a family's subclass of it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a training run. To change one, make a new configuration with `dataclasses.replace`."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig
    optimizer: OptimizerSettings
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    sources: Mapping[str, Source] = field(default_factory=dict, repr=False, compare=False)
    """Field name -> where its value came from, for all fields that do not have their default. Not a config group."""

    def resolved(self: C, world_size: int, *, epoch_samples: int | None = None) -> C:
        """Checks the groups against each other, and returns the configuration with a length in steps or samples.

        Args:
            world_size: number of processes.
            epoch_samples: number of sequences in the training data; required if the length is given in epochs.

        Raises:
            ValueError: two groups contradict each other, or the layout does not divide the number of processes.
        """
        # Other derived sizes stay properties of their group (`resolved_...`), so that a checkpoint's run_config.json
        # records what the user gave.
        try:
            training = self.training
            if training.num_epochs is not None and epoch_samples is not None:
                training = training.with_epochs(epoch_samples, self.parallel.data_parallel_size(world_size))
            validate(self.model, self.parallel, training, self.optimizer, self.data, world_size=world_size)
        except ValueError as error:
            raise ValueError(name_yaml(str(error), self.sources)) from None
        return dataclasses.replace(self, training=training)
