"""Flags that the tools share which run a trained model: how it is loaded, and how tokens are sampled."""

from dataclasses import dataclass
from typing import Any

from megatron_ext.config.command_line.field_checks import Switch, check_at_least, one_of_two


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Which step of a checkpoint is loaded, and how the model is split over the processes."""

    ckpt_step: int | None = None
    """Step to load, instead of the newest complete one."""

    bos: Switch = False
    """Begin every text (a prompt, a window of an evaluation) with the begin-of-text token. Without this and --no-bos as
    the model was trained."""

    no_bos: Switch = False
    """Begin every text without it."""

    tensor_model_parallel_size: int | None = None
    """Processes that share every layer's matrices. Without it as many as the model allows."""

    pipeline_model_parallel_size: int | None = None
    """Processes among which the layers are split. Without either the processes that cannot share the matrices, where
    they divide the layers; those that are left hold copies of the model."""

    bf16: bool = False
    """Compute in bfloat16."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        one_of_two(self, "bos", "no_bos")

    def load_options(self) -> dict[str, Any]:
        """The keyword arguments of `inference.load_model` that these flags are."""
        names = ("ckpt_step", "tensor_model_parallel_size", "pipeline_model_parallel_size", "bf16")
        return {**{name: getattr(self, name) for name in names}, "bos": one_of_two(self, "bos", "no_bos")}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the tokens of a continuation are chosen."""

    max_new_tokens: int = 64
    """Tokens to generate after each prompt."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""

    top_k: int = 0
    """Sample from the k most likely tokens only; 0 is all."""

    top_p: float = 0.0
    """Sample from the most likely tokens only that together have this probability; 0 is all."""

    seed: int = 1234
    """Seed of the sampling."""

    def sampling_options(self) -> dict[str, Any]:
        """The keyword arguments of `inference.Sampling` that these flags are."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        return {name: getattr(self, name) for name in names}
