"""The NPT layers of a model: finding them, and turning them off for a while.

A layer that is off is the base layer, bit for bit. With all of them off the model is the base model: the teacher.
"""

import contextlib
from collections.abc import Collection, Iterator

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward


def np_modules(chunks: list[GPTModel]) -> dict[int, NPFeedForward]:
    """This rank's NP components by the number of their layer, from 0."""
    return {
        module.layer_number - 1: module
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, NPFeedForward)
    }


@contextlib.contextmanager
def deactivated(chunks: list[GPTModel], layers: Collection[int] | None = None) -> Iterator[None]:
    """Within it the named layers, or all, are base layers.

    A backward pass that recomputes activations must end where its forward pass began: inside, or outside.

    Args:
        chunks: this rank's model chunks, unwrapped.
        layers: numbers from 0; those of other stages are left alone.
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
