"""The configuration of a progressive training, and the values in it that follow from the stacks; imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.run_config import RunConfig
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


@dataclass(frozen=True, kw_only=True)
class ProgressiveRunConfig(RunConfig):
    """All that a progressive training is told."""

    progressive: ProgressiveConfig
    """Stacks, trunk, growth and objective."""


_LENGTHS = ("train_iters", "train_samples", "num_epochs")


def stack_defaults(given: Mapping[str, Any]) -> Found:
    """Values that follow from the stacks.

    Args:
        given: field's name -> value, of the command line and the YAML file.

    Raises:
        ValueError: `--num-layers` is given, which follows from the stacks; or no length, or two.
    """
    if "num_layers" in given:
        raise ValueError(
            f"--num-layers {given['num_layers']}: follows from --target-stacks and --n-blocks, leave it out"
        )
    lengths = [name for name in ("stack_steps", "stack_tokens", *_LENGTHS) if name in given]
    flags = list(map(flag_name, lengths))
    if not flags:
        raise ValueError("--stack-steps: missing (or --stack-tokens, or --train-iters for every stack)")
    if len(flags) > 1:
        raise ValueError(f"{flags[0]}: cannot be given together with {flags[1]}")
    # The number of layers, and where the stacks have lengths of their own that of the run, are set by every phase.
    sections: dict[str, Any] = {"model": {"num_layers": 1, "untie_embeddings_and_output_weights": True}}
    if lengths[0] not in _LENGTHS:
        sections["training"] = {"train_iters": 1}
    return Found("set for every stack", sections)
