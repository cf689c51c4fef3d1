"""Finds the NPT layers of a model, and deactivates them temporarily.

An inactive layer equals the base layer bit for bit. With all layers inactive the model is the base model, the teacher.
"""

import contextlib
from collections.abc import Collection, Iterator

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward


def np_modules(chunks: list[GPTModel]) -> dict[int, NPFeedForward]:
    """Returns number of a layer, from 0 -> its NP components, for this rank's layers."""
    return {
        module.layer_number - 1: module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, NPFeedForward)
    }


@contextlib.contextmanager
def deactivated(chunks: list[GPTModel], layers: Collection[int] | None = None) -> Iterator[None]:
    """Context in which the given NPT layers run as base layers.

    With activation recomputation, forward and backward pass must both be inside or both outside of the context.

    Args:
        chunks: this rank's model chunks, unwrapped.
        layers: numbers of layers, from 0; those of other stages are ignored. None for all.
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
