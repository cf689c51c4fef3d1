"""The configurations that every training entry point takes; a script adds its families' own."""

from typing import Any

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.groups.training_config import TrainingConfig

TRAINING: dict[str, type[Any]] = {
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerSettings,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}
"""Name of the config group (heading in `--help`, section in a YAML file) -> dataclass."""
