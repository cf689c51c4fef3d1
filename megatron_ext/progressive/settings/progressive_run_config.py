"""The configuration of a progressive training run, and the defaults that depend on the stacks.

The command line reads this file, so it must not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.run_config import RunConfig
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


@dataclass(frozen=True, kw_only=True)
class ProgressiveRunConfig(RunConfig):
    """Configuration of a progressive training run: the config groups of all runs, and `progressive`."""

    progressive: ProgressiveConfig
    """How the model grows, what is trained, and the objective."""


_LENGTHS = ("train_iters", "train_samples", "num_epochs")


def stack_defaults(given: Mapping[str, Any]) -> Found:
    """Returns the defaults of flags that progressive training sets for every stack.

    Args:
        given: values set on the command line or in the YAML file, by field name.

    Raises:
        ValueError: `--num-layers` is given, or there is not exactly one flag for the length of training.
    """
    if "num_layers" in given:
        raise ValueError(
            f"--num-layers {given['num_layers']}: omit it; the number follows from --target-stacks and --n-blocks"
        )
    lengths = [name for name in ("stack_steps", "stack_tokens", *_LENGTHS) if name in given]
    flags = list(map(flag_name, lengths))
    if not flags:
        raise ValueError(
            "the length of training is missing; pass --stack-steps or --stack-tokens, or --train-iters for the "
            "number of steps of every stack"
        )
    if len(flags) > 1:
        raise ValueError(f"{flags[0]}: cannot be combined with {flags[1]}; omit one of them")
    # These values are placeholders: every phase sets its number of layers and, with --stack-steps or --stack-tokens,
    # its number of steps.
    sections: dict[str, Any] = {"model": {"num_layers": 1, "untie_embeddings_and_output_weights": True}}
    if lengths[0] not in _LENGTHS:
        sections["training"] = {"train_iters": 1}
    return Found("set for every stack", sections)
