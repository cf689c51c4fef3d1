"""Causal attention within a sliding window, in blocks of queries, without scores or a mask of size [s_q, s_k].

The query at position p attends to the keys p - w + 1 .. p, at most w of them. Queries are at the last positions of the
keys, as in `causal_attention`. The queries below position w attend to all earlier keys. The other queries are divided
into blocks of B. Each block attends, under a mask, to the B + w - 1 keys within the windows of its queries:

    B = w / 2, but at least 128 and at most 512

Time and memory are linear in the sequence. Shapes: queries [b, n, s_q, d], keys and values [b, g, s_k, d], where g
divides n.
"""

import torch
import torch.nn.functional as F

from megatron_ext.models.ops.causal_attention import attend_at_end
from megatron_ext.models.ops.chained_slices import take_slice

_SMALLEST_BLOCK, _LARGEST_BLOCK = 128, 512


def attend_in_window(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Computes attention, [b, n, s_q, d].

    Args:
        query: [b, n, s_q, d].
        key: [b, g, s_k, d]; s_k must be at least s_q.
        value: [b, g, s_k, d].
        window: w, the number of keys that a query attends to, including its own.
        dropout: rate at which attention weights are dropped.
        scale: factor of the scores; None for d^-0.5.
    """
    queries, keys = query.size(2), key.size(2)
    if keys <= window:
        return attend_at_end(query, key, value, dropout=dropout, scale=scale)
    # Concatenate keys and values, so that one operation takes both for a block, and one adds both gradients.
    joined = torch.cat([key, value], dim=-1)
    before = keys - queries
    outputs = []
    for start, end in _blocks(before, keys, window):
        first = max(0, start - window + 1)
        part, joined = take_slice(joined, 2, first, end - first)
        keys_seen, values_seen = part.split([key.size(-1), value.size(-1)], dim=-1)
        of_block = query[:, :, start - before : end - before]
        if end <= window:
            outputs.append(attend_at_end(of_block, keys_seen, values_seen, dropout=dropout, scale=scale))
            continue
        mask = _allowed(start - first, end - start, window, query.device)
        outputs.append(_attend(of_block, keys_seen, values_seen, mask, dropout, scale))
    return torch.cat(outputs, dim=2)


def _allowed(before: int, queries: int, window: int, device: torch.device) -> torch.Tensor:
    """Returns the mask [s_q, before + s_q] of a block, True where attention is allowed."""
    positions = torch.arange(before + queries, device=device)
    distance = positions[before:].unsqueeze(1) - positions
    return (distance >= 0) & (distance < window)


def block_size(window: int) -> int:
    """Returns B, the number of queries in a block."""
    return min(max(window // 2, _SMALLEST_BLOCK), _LARGEST_BLOCK)


def _blocks(start: int, end: int, window: int) -> list[tuple[int, int]]:
    """Divides the positions of the queries, from `start` to `end`, into blocks."""
    size = block_size(window)
    causal = [(start, min(window, end))] if start < window else []
    starts = range(max(start, window), end, size)
    return causal + [(block, min(block + size, end)) for block in starts]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    is_grouped = query.size(1) != key.size(1)
    if is_grouped and query.is_cuda:
        # On a GPU, no fused kernel supports both a mask and grouped keys.
        repeats = query.size(1) // key.size(1)
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
        is_grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scale, enable_gqa=is_grouped
    )
