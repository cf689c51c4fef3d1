"""Flags shared by the tools that run a trained model: how the model is loaded, and how tokens are sampled."""

from dataclasses import dataclass, fields
from typing import Any

from megatron_ext.config.command_line.field_checks import Switch, check_at_least, one_of_two


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Flags that choose the checkpoint step to load, and how the model is sharded over the processes."""

    ckpt_step: int | None = None
    """Step of the checkpoint to load. Default: the newest complete checkpoint."""

    bos: Switch = False
    """Put the begin-of-text token before every prompt and every evaluation window. Default: as in training."""

    no_bos: Switch = False
    """Do not put the begin-of-text token before prompts and evaluation windows. Default: as in training."""

    tensor_model_parallel_size: int | None = None
    """Number of processes that share each layer's matrices. Default: as many as the model allows."""

    pipeline_model_parallel_size: int | None = None
    """Number of pipeline stages. Default: 1 if --tensor-model-parallel-size is given, else as many as the model and the
    remaining processes allow. Any further processes hold copies of the model.
    """

    bf16: bool = False
    """Compute in bfloat16."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "tensor_model_parallel_size", "pipeline_model_parallel_size")
        one_of_two(self, "bos", "no_bos")

    def load_options(self) -> dict[str, Any]:
        """Returns these flags as keyword arguments of `inference.load_model`."""
        names = ("ckpt_step", "tensor_model_parallel_size", "pipeline_model_parallel_size", "bf16")
        return {**{name: getattr(self, name) for name in names}, "bos": one_of_two(self, "bos", "no_bos")}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Flags that control how tokens are sampled; `inference.Sampling` checks the values."""

    max_new_tokens: int = 64
    """Number of tokens to generate after each prompt."""

    temperature: float = 1.0
    """Divide the logits by this value; 0 always takes the most likely token (greedy decoding)."""

    top_k: int = 0
    """Number of most likely tokens to sample from; 0 turns the limit off."""

    top_p: float = 0.0
    """Sample from the smallest set of most likely tokens whose probabilities reach this sum; 0 turns this off."""

    seed: int = 1234
    """Random seed for sampling."""

    def sampling_options(self) -> dict[str, Any]:
        """Returns these flags as keyword arguments of `inference.Sampling`."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
