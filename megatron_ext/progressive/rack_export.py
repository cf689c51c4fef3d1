"""Exports a rack for Hugging Face: a plain model with merged adapters, or a base model with adapters for `peft`.

Only a causal rack has a Llama architecture; with other objectives attention is bidirectional. Four-bit weights are
exported as their dequantized values.
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
        plan: the settings of all layers, by layer number.
        as_adapters: whether adapters are to be exported separately.

    Raises:
        ValueError: attention is bidirectional, or adapters are requested but there are none.
    """
    if config.bidirectional:
        raise ValueError(
            f"a rack trained with --training-objective {config.training_objective} cannot be exported: its attention "
            "is bidirectional, which no Llama-like model supports"
        )
    if as_adapters and not any(settings.adapters for settings in plan.values()):
        raise ValueError(
            f"{ADAPTER_FLAG}: the rack has no adapters; use --merge-adapters, which exports it unchanged"
        )


def write_adapters(
    chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
) -> list[str]:
    """Writes every adapter with `export_peft` to a directory named after it; returns one message per adapter."""
    names = sorted({name for _, _, linear in adapted_linears(chunks) for name in linear.adapters})
    for name in names:
        export_peft(chunks, name, model, directory / name, base_model=base_model, overwrite=overwrite)
    return [f"adapter {name} in peft's format: {directory / name}" for name in names]


def precision_notes(rack: Rack, plan: SettingsByLayer) -> list[str]:
    """Returns messages about stacks that were stored in four bits or computed in 16 bits."""
    messages = []
    for stack, layers in rack.layers():
        precision = plan[layers.start].precision
        if is_packed(precision):
            messages.append(f"stack {stack.index}: {precision}, exported dequantized")
        elif precision in ("half", "bfloat16"):
            messages.append(
                f"stack {stack.index}: was computed in {precision}; its stored weights are exported"
            )
    return messages
