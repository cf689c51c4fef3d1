"""The adapted layers of a model: what trains in them, how they are stored, what they weigh, and merging.

A plan, layer number (from 0 over the whole model) -> `LayerSettings`, says everything about adapters and precision. It
is used twice: when the model is built (`adapted_linear.linear_modules`), and by `prepare_layers` before it is wrapped.
"""

from collections.abc import Iterator, Mapping

import torch

from megatron_ext.lora.parallel_linear import AdaptedLinear, LayerSettings
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_layer import SLOTS

SettingsByLayer = Mapping[int, LayerSettings]


def prepare_layers(chunks: list[GPTModel], plan: SettingsByLayer) -> None:
    """Freezes what a plan freezes, frees what it trains, and puts frozen weights into their precision.

    Call it before the model is wrapped, and again after weights were loaded into it from outside a checkpoint of
    this plan. Modules in the layers' slots belong to other families and are left alone.

    Args:
        chunks: this rank's model chunks, unwrapped, built with the same plan.
        plan: layers that are not in it are left alone.
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
    """Layer number, name in the layer (`mlp.linear_fc1`) and module of every adapted linear layer of this rank."""
    for number, layer in _layers(chunks):
        for name, module in layer.named_modules():
            if isinstance(module, AdaptedLinear):
                yield number, name, module


@torch.no_grad()
def merge_adapters(chunks: list[GPTModel]) -> None:
    """Adds every adapter to its base weight and removes it; the model's function stays, to rounding.

    The weights are then plain ones, also those that were packed. For a model that is not wrapped
    for training: an optimizer would keep the removed parameters.

    Args:
        chunks: this rank's model chunks, unwrapped.
    """
    for _, _, linear in adapted_linears(chunks):
        linear.merge_adapters()


def weight_bytes(chunks: list[GPTModel]) -> dict[int, int]:
    """Bytes of all weights that this rank holds of each layer, as they are stored, by the layer's number."""
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
