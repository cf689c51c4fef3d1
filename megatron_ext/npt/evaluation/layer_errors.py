"""Computes the error of each NPT layer's MLP per token, relative to the token's target.

The target is the same as in training (`layer_losses`). The NPT layer and its base layer both get the input h that the
layer has in the base model, and therefore have the same attention output a:

    target              keep  MLP(LN2(h + a))           drop  a + MLP(LN2(h + a))
    error of a token    |MLP*(LN2(h)) - target| / |target|,     the norm over the hidden size
    untrained           the same, but with MLP(LN2(h)) (without deltas) instead of MLP*(LN2(h))
    overall             sqrt(sum of |difference|^2 / sum of |target|^2), sums over all tokens

A token is massive if its |target|^2 is above 100 times the median. If massive tokens have most of the sum of squares,
`overall` describes only them; median and percentiles describe all tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.npt.evaluation.distribution import distribution

MASSIVE = 100.0
"""A token is massive if the square of its target is above this many times the median."""

Squares = npt.NDArray[np.float32]
"""[tokens, 3]: |target|^2, and |difference|^2 of the NPT layer and of the layer without deltas."""


def layer_errors(squares: Mapping[int, Sequence[Squares]]) -> dict[int, dict[str, Any]]:
    """Returns the report on every layer.

    Args:
        squares: maps each layer to arrays that together hold all tokens, in any order.
    """
    return {number: _of_layer(np.concatenate(parts)) for number, parts in sorted(squares.items())}


def _of_layer(squares: Squares) -> dict[str, Any]:
    target, trained, untrained = squares.astype(np.float64).T
    total = target.sum()
    massive = target > MASSIVE * np.median(target)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "untrained": distribution(np.sqrt(untrained / target)),
            "trained": distribution(np.sqrt(trained / target)),
            "untrained_overall": float(np.sqrt(untrained.sum() / total)),
            "trained_overall": float(np.sqrt(trained.sum() / total)),
            "massive_tokens": int(massive.sum()),
            "massive_share": float(target[massive].sum() / total),
            "largest_share": float(target.max() / total),
        }
