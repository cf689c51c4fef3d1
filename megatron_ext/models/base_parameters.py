"""Which parameters of a model are the base model's, and which a family's: for families that freeze the base."""

from collections.abc import Iterable, Iterator

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.transformer_layer import SLOTS

ADAPTERS = "adapters"
"""Attribute under which a linear module holds what a family adds to it."""


def base_parameters(chunk: GPTModel) -> Iterator[torch.nn.Parameter]:
    """The parameters of a chunk that are in no layer's slot, no family's stage module and no adapter."""
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        in_slot = parts[:2] == ["decoder", "layers"] and parts[3] in SLOTS
        if not in_slot and ADAPTERS not in parts and parts[0] not in chunk.stage_module_names:
            yield parameter


def base_parameter_ids(chunks: Iterable[GPTModel]) -> set[int]:
    """The `id`s of the chunks' base parameters: what tells a tensor of a state dict to be one of them."""
    return {id(parameter) for chunk in chunks for parameter in base_parameters(chunk)}
