"""Causal attention whose queries are at the last positions of the keys, without an [s_q, s_k] mask.

Query i of s_q attends to the keys 0 .. s_k - s_q + i. torch's `is_causal` means this only if s_q = s_k. Shapes: queries
[b, n, s_q, d], keys and values [b, g, s_k, d], where g divides n.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_at_end(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Computes attention, [b, n, s_q, d].

    Args:
        query: [b, n, s_q, d].
        key: [b, g, s_k, d]; s_k must be at least s_q.
        value: [b, g, s_k, d].
        dropout: rate at which attention weights are dropped.
        scale: factor of the scores; None for d^-0.5.
    """
    queries, keys, is_grouped = query.size(2), key.size(2), query.size(1) != key.size(1)
    if queries == 1:  # a single query attends to all keys
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout, scale=scale, enable_gqa=is_grouped
        )
    if queries != keys and query.is_cuda:
        return attend_on_gpu(query, key, value, dropout=dropout, scale=scale)
    if queries != keys and dropout == 0.0:
        result: torch.Tensor = _TwoBlocks.apply(query, key, value, scale)
        return result
    # On the CPU, torch has no fused attention with dropout, so the scores are materialized with or without a mask.
    mask = None if queries == keys else allowed_keys(queries, keys, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
    )


def attend_on_gpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, scale: float | None
) -> torch.Tensor:
    """Like `attend_at_end`, but with those kernels of torch that align the causal mask at the last key.

    If there is no fused kernel for a shape or dtype, torch builds the mask.
    """
    from torch.nn.attention.bias import (  # importing this module also imports torch's compiler, which takes seconds
        CausalBias,
        CausalVariant,
    )

    bias: Any = _LowerRight(query.size(2), key.size(2), CausalVariant.LOWER_RIGHT)
    is_grouped = query.size(1) != key.size(1)
    return CausalBias._dispatch(query, key, value, bias, dropout, scale=scale, enable_gqa=is_grouped)


def allowed_keys(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Returns the mask [s_q, s_k] of this attention, True if a query may attend to a key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal=keys - queries)


@dataclass(frozen=True)
class _LowerRight:
    """Replaces torch's `causal_lower_right`, which would allocate a tensor of [2, s_q, s_k] values that nothing
    reads.
    """

    seq_len_q: int
    seq_len_kv: int
    variant: Any

    def _materialize(self, device: torch.device) -> torch.Tensor:
        return allowed_keys(self.seq_len_q, self.seq_len_kv, device)


class _TwoBlocks(torch.autograd.Function):
    """Causal attention in two fused passes, since torch's fused CPU kernel requires equally many queries and keys.

    The passes, one over the keys before the first query and one over the last s_q keys, give outputs o_1, o_2 and the
    logarithms l_1, l_2 of their softmax's denominators. The result is

        o = (1 - w) o_1 + w o_2,      w = sigmoid(l_2 - l_1),      l = log(e^l_1 + e^l_2)

    The backward pass of each block, called with o and l instead of the block's own values, gives the block's part of
    the gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        before = key.size(2) - query.size(2)
        (key_1, key_2), (value_1, value_2) = (each.tensor_split([before], dim=2) for each in (key, value))
        output_1, log_1 = _flash(query, key_1, value_1, 0.0, False, scale=scale)
        output_2, log_2 = _flash(query, key_2, value_2, 0.0, True, scale=scale)
        weight = torch.sigmoid(log_2 - log_1).unsqueeze(-1)
        output = torch.lerp(output_1.to(weight.dtype), output_2.to(weight.dtype), weight).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, torch.logaddexp(log_1, log_2))
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        query, key, value, output, log = ctx.saved_tensors
        before = key.size(2) - query.size(2)
        (key_1, key_2), (value_1, value_2) = (each.tensor_split([before], dim=2) for each in (key, value))
        known = output, log, 0.0
        first = _flash_backward(grads[0], query, key_1, value_1, *known, False, scale=ctx.scale)
        second = _flash_backward(grads[0], query, key_2, value_2, *known, True, scale=ctx.scale)
        of_keys, of_values = (torch.cat(pair, dim=2) for pair in zip(first[1:], second[1:], strict=True))
        return first[0] + second[0], of_keys, of_values, None
