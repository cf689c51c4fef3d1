"""Attention of each document to itself in sequences of several documents, without scores or a mask of size [s, s].

Queries are at the positions `first`, `first + 1`, ... of every sequence, which holds s_k keys. The queries of a
document attend to the keys of the same document. With causal attention, they attend only to keys up to their own
position and within the window. Each document takes one call of `causal_attention` or `windowed_attention`; on a GPU,
one kernel computes all documents if torch has such a kernel. Shapes: queries [b, n, s_q, d], keys and values [b, g,
s_k, d], where g divides n.
"""

import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from megatron_ext.models.ops.causal_attention import attend_at_end
from megatron_ext.models.ops.chained_slices import take_slice
from megatron_ext.models.ops.windowed_attention import attend_in_window

_LARGEST_FUSED_HEAD = 256


def attend_to_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    *,
    first: int = 0,
    causal: bool = True,
    window: int | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Computes attention, [b, n, s_q, d].

    Args:
        query: [b, n, s_q, d].
        key: [b, g, s_k, d].
        value: [b, g, s_k, d].
        bounds: [D + 1] in host memory; see `document_bounds`.
        first: position of the first query.
        causal: whether attention is causal.
        window: number of keys that a causal query attends to, including its own; None for all earlier keys.
        dropout: rate at which attention weights are dropped.
        scale: factor of the scores; None for d^-0.5.
    """
    if query.size(2) == key.size(2) and dropout == 0.0 and _is_fused(query):
        return _in_one_kernel(query, key, value, bounds, causal=causal, window=window, scale=scale)
    batch, heads, queries, _ = query.shape
    length, sizes = key.size(2), [key.size(-1), value.size(-1)]
    pieces = list(_pieces(bounds.tolist(), length, first, first + queries, causal))
    # Concatenate keys and values, so that one operation takes both for a document, and one adds both gradients.
    joined = _end_to_end(torch.cat([key, value], dim=-1))
    outputs = []
    by_document = _end_to_end(query).split([count for count, _, _ in pieces], dim=2)
    for of_document, (_, start, end) in zip(by_document, pieces, strict=True):
        part, joined = take_slice(joined, 2, start, end - start)
        keys, values = part.split(sizes, dim=-1)
        outputs.append(_attend(of_document, keys, values, causal, window, dropout, scale))
    whole = torch.cat(outputs, dim=2)
    return whole.view(heads, batch, queries, -1).transpose(0, 1)


def _pieces(
    bounds: list[int], length: int, first: int, end: int, causal: bool
) -> Iterator[tuple[int, int, int]]:
    """Yields (number of queries, begin of keys, end of keys) for each document with queries at positions `first` to
    `end`.

    The keys' range counts positions in the concatenated sequences. With causal attention, it ends at the document's
    last query.
    """
    for start, stop in itertools.pairwise(bounds):
        row = start // length * length
        last = min(stop, row + end)
        count = last - max(start, row + first)
        if count > 0:
            yield count, start, last if causal else stop


def _end_to_end(values: torch.Tensor) -> torch.Tensor:
    """Reorders [b, n, s, d] to [1, n, b * s, d]."""
    return values.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    window: int | None,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    if not causal:
        is_grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(
            query, key, value, None, dropout, scale=scale, enable_gqa=is_grouped
        )
    if window is None:
        return attend_at_end(query, key, value, dropout=dropout, scale=scale)
    return attend_in_window(query, key, value, window, dropout=dropout, scale=scale)


def _is_fused(query: torch.Tensor) -> bool:
    """Returns whether torch has a kernel for documents of any lengths; it has none on the CPU, and none for fp32."""
    head = query.size(-1)
    fits = query.dtype in (torch.bfloat16, torch.float16) and head % 8 == 0 and head <= _LARGEST_FUSED_HEAD
    return query.is_cuda and fits and _kernel() is not None


@functools.cache
def _kernel() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Earlier versions have neither windows nor grouped keys.
    needed = {"window_size", "enable_gqa"}
    return varlen_attn if needed <= inspect.signature(varlen_attn).parameters.keys() else None


def _in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> torch.Tensor:
    batch, _, length, _ = query.shape
    tokens = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    numbers = bounds.tolist()
    longest = max(end - start for start, end in itertools.pairwise(numbers))
    on_device = bounds.to(query.device, non_blocking=True)
    # The kernel's left window excludes the query's own key.
    left = -1 if window is None else window - 1
    context = _kernel()(
        *tokens,
        on_device,
        on_device,
        longest,
        longest,
        scale=scale,
        window_size=(left, 0) if causal else (-1, -1),
        enable_gqa=query.size(1) != key.size(1),
    )
    return context.unflatten(0, (batch, length)).transpose(1, 2)
