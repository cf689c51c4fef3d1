"""Exports a rack (a grown model) for Hugging Face: with merged adapters, or as a base model with adapters for `peft`.

Only a rack trained with next-token prediction can be exported as a Llama architecture; other objectives use
bidirectional attention. Four-bit weights are exported as their dequantized values.
"""

from megatron_ext.interop.peft_export import ADAPTER_FLAG
from megatron_ext.lora.four_bit_weights import is_packed
from megatron_ext.lora.parallel_linear import SettingsByLayer
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


def check_plain(config: ProgressiveConfig, plan: SettingsByLayer, *, as_adapters: bool) -> None:
    """Checks that a rack can be exported.

    Args:
        config: the configuration of progressive training.
        plan: trained parts, adapters and precision of each layer, by layer number.
        as_adapters: whether adapters are to be exported separately.

    Raises:
        ValueError: attention is bidirectional, or adapters are requested but there are none.
    """
    if config.bidirectional:
        raise ValueError(
            f"a model trained with --training-objective {config.training_objective} cannot be "
            "exported: its attention is bidirectional, which no Llama-like model supports"
        )
    if as_adapters and not any(settings.adapters for settings in plan.values()):
        raise ValueError(
            f"{ADAPTER_FLAG}: requires a model with adapters, but this one has none; use --merge-adapters instead"
        )


def precision_notes(rack: Rack, plan: SettingsByLayer) -> list[str]:
    """Returns messages about stacks whose exported weights differ from those stored or used in computation."""
    messages = []
    for stack, layers in rack.layers():
        precision = plan[layers.start].precision
        if is_packed(precision):
            messages.append(
                f"stack {stack.index} is stored in {precision}; its dequantized weights are exported"
            )
        elif precision in ("half", "bfloat16"):
            messages.append(
                f"stack {stack.index} was computed in {precision}; its stored weights are exported"
            )
    return messages
