"""Separates the base model's parameters from those of the families, for families that freeze the base model."""

from collections.abc import Iterable, Iterator

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_layer import SLOTS

ADAPTERS = "adapters"
"""Attribute of a linear module that holds the modules a family adds to it."""


def base_parameters(chunk: GPTModel) -> Iterator[torch.nn.Parameter]:
    """Yields the parameters of a chunk that are in no layer slot, no stage module and no adapter."""
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        in_slot = parts[:2] == ["decoder", "layers"] and parts[3] in SLOTS
        if not in_slot and ADAPTERS not in parts and parts[0] not in chunk.stage_module_names:
            yield parameter


def base_parameter_ids(chunks: Iterable[GPTModel]) -> set[int]:
    """Returns the `id()` of every base parameter; the tensors of a state dict are recognised by it."""
    return {id(parameter) for chunk in chunks for parameter in base_parameters(chunk)}
