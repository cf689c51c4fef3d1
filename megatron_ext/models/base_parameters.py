"""Which parameters of a model are the base model's, and which a family's: for families that freeze the base."""

from collections.abc import Iterator

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.layer import SLOTS


def base_parameters(chunk: GPTModel) -> Iterator[torch.nn.Parameter]:
    """The parameters of a chunk that are neither in a layer's slot nor in a family's stage module."""
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        in_slot = parts[:2] == ["decoder", "layers"] and parts[3] in SLOTS
        if not in_slot and parts[0] not in chunk.stage_module_names:
            yield parameter
