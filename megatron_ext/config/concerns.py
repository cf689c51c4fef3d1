"""The configurations that every training entry point takes; a script adds its families' own."""

from typing import Any

from megatron_ext.config.checkpoint import CheckpointConfig
from megatron_ext.config.data import DataConfig
from megatron_ext.config.logging import LoggingConfig
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.optimizer import OptimizerSettings
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.tokenizer import TokenizerConfig
from megatron_ext.config.training import TrainingConfig

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
"""Name (group of `--help`, section of a YAML file) -> dataclass."""
