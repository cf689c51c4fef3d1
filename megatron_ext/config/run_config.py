"""The configuration of a training run: a frozen tree of config groups.

Each model family (PLE, NPT, progressive growth) adds its own groups in a subclass of `RunConfig`.
"""

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
from megatron_ext.config.groups.rehearsal_config import RehearsalConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig

C = TypeVar("C", bound="RunConfig")
"""`RunConfig` or a model family's subclass of it."""


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
    rehearsal: RehearsalConfig = field(default_factory=RehearsalConfig)

    sources: Mapping[str, Source] = field(default_factory=dict, repr=False, compare=False)
    """Maps each field that differs from its default to the source of its value (a flag, the YAML file, a checkpoint).
    Unlike the other fields, `sources` is not a config group.
    """

    def resolved(self: C, world_size: int, *, epoch_samples: int | None = None) -> C:
        """Checks the config groups against each other, and converts a run length in epochs to optimizer steps.

        Args:
            world_size: number of processes.
            epoch_samples: number of sequences in the training data; required if the run length is given in epochs.

        Returns:
            The checked configuration, whose run length is in optimizer steps or samples.

        Raises:
            ValueError: two groups contradict each other, or the parallel layout does not fit the number of processes.
        """
        # Other derived sizes are not stored but are properties of their group (`resolved_...`), so that a
        # checkpoint's run_config.json records the user's own values.
        try:
            training = self.training.in_samples(self.model.seq_length)
            if training.num_epochs is not None and epoch_samples is not None:
                training = training.with_epochs(epoch_samples, self.parallel.data_parallel_size(world_size))
            validate(self.model, self.parallel, training, self.optimizer, self.data, world_size=world_size)
        except ValueError as error:
            raise ValueError(name_yaml(str(error), self.sources)) from None
        return dataclasses.replace(self, training=training)
