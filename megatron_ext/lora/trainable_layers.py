"""Freezes layers, converts their weights to other precisions, and merges adapters, in a model with `AdaptedLinear`s.

An `AdaptedLinear` is a linear layer with LoRA adapters and a precision. A plan (`SettingsByLayer`) specifies both for
every layer. The plan is used twice: to build the model (`parallel_linear.linear_modules`), and in `prepare_layers`,
before the model is wrapped for data parallelism.
"""

from collections.abc import Iterator

import torch

from megatron_ext.lora.parallel_linear import AdaptedLinear, SettingsByLayer
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_layer import SLOTS


def prepare_layers(chunks: list[GPTModel], plan: SettingsByLayer) -> None:
    """Freezes and unfreezes parameters, and converts frozen weights to their layer's precision, as a plan specifies.

    Call it before the model is wrapped, and again after loading weights that were not saved with this plan. Modules in
    the layers' slots belong to other model families and do not change.

    Args:
        chunks: this rank's model chunks, unwrapped, built with the same plan.
        plan: the settings by layer; layers without settings do not change.
    """
    for number, layer in _layers(chunks):
        if number not in plan:
            continue
        settings = plan[number]
        for linear in _linears(layer):
            if linear.is_stored and settings.trains_base:
                linear.restore_weight()
        for name, parameter in layer.named_parameters():
            parts = name.split(".")
            if ADAPTERS in parts:
                parameter.requires_grad_(parts[parts.index(ADAPTERS) + 1] in settings.trained_adapters)
            elif parts[0] not in SLOTS and parameter.is_floating_point():
                parameter.requires_grad_(settings.trains_base)
        if not settings.trains_base:
            for linear in _linears(layer):
                linear.store_weight()


def adapted_linears(chunks: list[GPTModel]) -> Iterator[tuple[int, str, AdaptedLinear]]:
    """Yields layer number, name (such as `mlp.linear_fc1`) and module of every adapted linear layer of this rank."""
    for number, layer in _layers(chunks):
        for name, module in layer.named_modules():
            if isinstance(module, AdaptedLinear):
                yield number, name, module


@torch.no_grad()
def merge_adapters(chunks: list[GPTModel]) -> None:
    """Adds every adapter to its base weight and removes the adapter; up to rounding, the model's function is unchanged.

    Packed weights become plain ones. The model must not have an optimizer, which would keep the removed parameters.

    Args:
        chunks: this rank's model chunks, unwrapped.
    """
    for _, _, linear in adapted_linears(chunks):
        linear.merge_adapters()


def weight_bytes(chunks: list[GPTModel]) -> dict[int, int]:
    """Returns, by layer number, the bytes of the layer's stored weights on this rank."""
    return {
        number: sum(
            tensor.numel() * tensor.element_size() for tensor in (*layer.parameters(), *layer.buffers())
        )
        for number, layer in _layers(chunks)
    }


def _layers(chunks: list[GPTModel]) -> Iterator[tuple[int, torch.nn.Module]]:
    for chunk in chunks:
        yield from zip(chunk.stage.layer_numbers, chunk.decoder.layers, strict=True)


def _linears(layer: torch.nn.Module) -> list[AdaptedLinear]:
    return [module for module in layer.modules() if isinstance(module, AdaptedLinear)]
