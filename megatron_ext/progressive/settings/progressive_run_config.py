"""The configuration of a progressive training run, and the defaults that depend on the stacks.

The command line reads this file, so it must not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.groups.model.layer_shapes import refuse_layer_sizes
from megatron_ext.config.groups.model.parts_of_gemma3n import refuse_parts_of_gemma3n
from megatron_ext.config.run_config import RunConfig
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


@dataclass(frozen=True, kw_only=True)
class ProgressiveRunConfig(RunConfig):
    """Configuration of a progressive training run: the config groups of all runs, and `progressive`."""

    progressive: ProgressiveConfig
    """The growth of the model, its trained parts, and the objective."""

    def __post_init__(self) -> None:
        refuse_layer_sizes(self.model, "progressive training")
        # The trunk cache and skipped layers support only one residual stream, and a list fits only one number of
        # layers.
        names = ("altup_streams", "mlp_activation_sparsity")
        refuse_parts_of_gemma3n(self.model, names, "progressive training")
        self._check_windows()

    def _check_windows(self) -> None:
        """Checks that, as the model grows, no layer gains or loses its sliding window or its rotary positions."""
        size = self.model.window_size
        if size is not None and self.progressive.bidirectional:
            raise ValueError(
                f"--window-size {size}: requires --training-objective clm (got "
                f"{self.progressive.training_objective}, with which a token attends to all tokens)"
            )
        for name in ("window_attn_skip_freq", "no_rope_freq"):
            value = getattr(self.model, name)
            if value is not None:
                self._check_frequency(flag_name(name), value)

    def _check_frequency(self, flag: str, value: str) -> None:
        if not value.isdecimal():
            raise ValueError(
                f"{flag} {value}: must be a number in progressive training, because a list fits only "
                "one number of layers"
            )
        own = self.progressive
        for index in range(1, own.num_stacks):
            if own.mode_of(index) == "prepend" and own.blocks_of(index) % int(value):
                raise ValueError(
                    f"{flag} {value}: must divide --n-blocks {own.blocks_of(index)} with "
                    "--building-mode prepend, because every new stack shifts the layers above it by this number"
                )


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
