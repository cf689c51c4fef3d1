"""Separates the base model's parameters from those that model families add, so that a family can freeze the base."""

from collections.abc import Iterable, Iterator

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_layer import SLOTS

ADAPTERS = "adapters"
"""Name of the attribute in which a linear module holds its adapters, the modules that a model family adds to it."""


def base_parameters(chunk: GPTModel) -> Iterator[torch.nn.Parameter]:
    """Returns the parameters of a chunk's base model: all except those of layer slots, stage modules and adapters."""
    return (parameter for name, parameter in chunk.named_parameters() if _is_base(chunk, name))


def _is_base(chunk: GPTModel, name: str) -> bool:
    parts = name.split(".")
    in_slot = parts[:2] == ["decoder", "layers"] and parts[3] in SLOTS
    return not in_slot and ADAPTERS not in parts and parts[0] not in chunk.stage_module_names


def base_tensor_ids(chunks: Iterable[GPTModel]) -> set[int]:
    """Returns the `id()` of every base parameter and buffer, which identify these tensors in a state dict."""
    return {
        id(tensor)
        for chunk in chunks
        for name, tensor in (*chunk.named_parameters(), *chunk.named_buffers())
        if _is_base(chunk, name)
    }
