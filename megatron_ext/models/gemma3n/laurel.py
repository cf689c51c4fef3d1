"""Laurel, a learned augmented residual: a low-rank path beside the attention, as in Gemma 3n.

    n = LN1(x)
    x <- (x + Attention(n) + n + RMSNorm(W_right W_left n)) / sqrt(2)

W_left is [r, h] and W_right is [h, r]; every tensor-parallel rank holds both completely. Shapes: [s, b, h], under
sequence parallelism [s/t, b, h].
Sources: LAuReL (arXiv 2411.07501); transformers' `Gemma3nTextLaurelBlock`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.models.ops.norm import Norm, replicated_parameter


class Laurel(torch.nn.Module):
    """Computes n + RMSNorm(W_right W_left n)."""

    def __init__(self, config: TransformerConfig, eps: float, *, rank: int) -> None:
        """Args:
        config: the engine's configuration.
        eps: epsilon of the norm.
        rank: r.
        """
        super().__init__()
        self.left = replicated_parameter(config, rank, config.hidden_size)
        self.right = replicated_parameter(config, config.hidden_size, rank)
        self.post_norm = Norm(config, config.hidden_size, eps)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """Applies the path to the attention's normalized input, [s, b, h] -> [s, b, h]."""
        projected = F.linear(F.linear(normed, self.left), self.right)
        output: torch.Tensor = normed + self.post_norm(projected)
        return output


def with_laurel(
    laurel: Laurel, norm: torch.nn.Module, add: Callable[..., Callable[..., torch.Tensor]]
) -> Callable[..., Callable[..., torch.Tensor]]:
    """Wraps the attention's bias-dropout-add `add`: adds Laurel's path to its result and scales the sum."""

    def choose(*args: Any) -> Callable[..., torch.Tensor]:
        add_residual = add(*args)

        def run(returned: Any, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            # Compute the norm again, because the engine may have freed its output for recomputation.
            path = laurel(norm(residual))
            return (add_residual(returned, residual, dropout) + path) * 0.5**0.5

        return run

    return choose
