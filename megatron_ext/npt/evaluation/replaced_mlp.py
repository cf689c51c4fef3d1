"""Temporarily replaces the computation of the MLP in every NPT layer. One replacement is defined here:

    without deltas      MLP(LN2(h)): the converted layer before anything is learned

The MLP's input is the normed input of the layer, and the attention output has no effect on the MLP.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward
from megatron_ext.npt.modules.npt_layers import base_mlp, np_modules

MLPOutput = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""A function with the arguments and the result of `NPFeedForward.mlp_output`."""


@contextlib.contextmanager
def replaced_mlp(chunks: list[GPTModel], make: Callable[[NPFeedForward], MLPOutput]) -> Iterator[None]:
    """Returns a context in which the NPT layers call `make(module)` instead of `module.mlp_output`.

    Args:
        chunks: this rank's model chunks, unwrapped.
        make: takes an NPT layer's module and returns the replacement, which may call the module's own `mlp_output`.
    """
    modules = np_modules(chunks).values()
    for module in modules:
        module.__dict__["mlp_output"] = make(module)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["mlp_output"]


def without_deltas(chunks: list[GPTModel]) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the NPT layers compute MLP(LN2(h)), without any delta."""
    return replaced_mlp(chunks, lambda module: lambda layer, hidden_states, _: base_mlp(layer, hidden_states))
