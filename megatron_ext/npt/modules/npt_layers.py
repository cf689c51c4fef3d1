"""Finds the NPT layers of a model, deactivates them temporarily, and runs the MLP of a layer without NP components.

The output of an inactive NPT layer equals that of the base layer bit for bit. With all NPT layers inactive, the model
is the base model, which serves as the teacher in training.
"""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward


def np_modules(chunks: list[GPTModel]) -> dict[int, NPFeedForward]:
    """Maps the index (from 0) of each NPT layer on this rank to its feed-forward module."""
    return {
        module.layer_number - 1: module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, NPFeedForward)
    }


@contextlib.contextmanager
def deactivated(chunks: list[GPTModel], layers: Collection[int] | None = None) -> Iterator[None]:
    """Returns a context in which the given NPT layers run as base layers.

    With activation recomputation, the forward pass and the backward pass must both run inside the context, or both
    outside it.

    Args:
        chunks: this rank's model chunks, unwrapped.
        layers: indices of layers, from 0; layers of other pipeline stages are ignored. None for all NPT layers.
    """
    chosen = [module for number, module in np_modules(chunks).items() if layers is None or number in layers]
    before = [module.active for module in chosen]
    for module in chosen:
        module.active = False
    try:
        yield
    finally:
        for module, active in zip(chosen, before, strict=True):
            module.active = active


def base_mlp(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns MLP(LN2(x)) of a layer without NP components, with bias, [s, b, h]."""
    output, bias = layer.mlp(layer.pre_mlp_layernorm(x))
    return output if bias is None else output + bias
