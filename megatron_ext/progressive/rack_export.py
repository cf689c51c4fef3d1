"""Exports a rack (a grown model) for Hugging Face: with merged adapters, or as a base model with adapters for `peft`.

Only a rack trained with next-token prediction can be exported as a Llama architecture; other objectives use
bidirectional attention. Four-bit weights are exported as their dequantized values.
"""

from pathlib import Path

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.peft_export import ADAPTER_FLAG, export_peft
from megatron_ext.lora.four_bit_weights import is_packed
from megatron_ext.lora.parallel_linear import SettingsByLayer
from megatron_ext.lora.trainable_layers import adapted_linears
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


def check_plain(config: ProgressiveConfig, plan: SettingsByLayer, *, as_adapters: bool) -> None:
    """Checks that a rack can be exported.

    Args:
        config: the configuration of progressive training.
        plan: what is trained in each layer, and its adapters and precision, by layer number.
        as_adapters: whether adapters are to be exported separately.

    Raises:
        ValueError: attention is bidirectional, or adapters are requested but there are none.
    """
    if config.bidirectional:
        raise ValueError(
            f"a model trained with --training-objective {config.training_objective} cannot be exported: its attention "
            "is bidirectional, which no Llama-like model supports"
        )
    if as_adapters and not any(settings.adapters for settings in plan.values()):
        raise ValueError(
            f"{ADAPTER_FLAG} requires a model with adapters, but this one has none; use --merge-adapters instead"
        )


def write_adapters(
    chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
) -> list[str]:
    """Writes each adapter with `export_peft` to a directory named after the adapter; returns a message per adapter."""
    names = sorted({name for _, _, linear in adapted_linears(chunks) for name in linear.adapters})
    for name in names:
        export_peft(chunks, name, model, directory / name, base_model=base_model, overwrite=overwrite)
    return [f"wrote adapter {name} in peft's format to {directory / name}" for name in names]


def precision_notes(rack: Rack, plan: SettingsByLayer) -> list[str]:
    """Returns messages about stacks whose exported weights differ from what was stored or computed."""
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
