"""What a rack is for Hugging Face: a plain model with its adapters merged, or a base model with adapters for `peft`.

Only a causal rack has a Llama architecture: with another objective every token sees all others. Weights of four bits
are exported as the values they stand for.
"""

from pathlib import Path

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.peft_export import ADAPTER_FLAG, export_peft
from megatron_ext.lora.four_bit_weights import is_packed
from megatron_ext.lora.trainable_layers import SettingsByLayer, adapted_linears
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig


def check_plain(config: ProgressiveConfig, plan: SettingsByLayer, *, as_adapters: bool) -> None:
    """Raises `ValueError` for a rack that has no Llama architecture, or no adapters where they are asked for."""
    if config.bidirectional:
        raise ValueError(
            f"a rack trained with --training-objective {config.training_objective} cannot be exported: every token "
            "sees all others, and in no Llama-family model it does"
        )
    if as_adapters and not any(settings.adapters for settings in plan.values()):
        raise ValueError(f"{ADAPTER_FLAG}: the rack has no adapters; --merge-adapters exports it as it is")


def write_adapters(
    chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
) -> list[str]:
    """Writes every adapter into a directory of its name, as `peft_export.export_peft`; returns a note on each."""
    names = sorted({name for _, _, linear in adapted_linears(chunks) for name in linear.adapters})
    for name in names:
        export_peft(chunks, name, model, directory / name, base_model=base_model, overwrite=overwrite)
    return [f"adapter {name} in peft's format: {directory / name}" for name in names]


def precision_notes(rack: Rack, plan: SettingsByLayer) -> list[str]:
    """What the user should know of stacks that were stored in four bits or computed in 16."""
    messages = []
    for stack, layers in rack.layers():
        precision = plan[layers.start].precision
        if is_packed(precision):
            messages.append(f"stack {stack.index}: {precision}, dequantised")
        elif precision in ("half", "bfloat16"):
            messages.append(f"stack {stack.index}: was computed in {precision}, its weights are exported")
    return messages
