"""The beginnings of documents in a micro-batch, as batch fields and in the form that megatron-core passes to
attention.

A dataset marks each document's first token. The marks of a micro-batch [b, s] are converted to bounds, D + 1 numbers
for D documents: the positions of the marked tokens in the concatenated rows, followed by b * s. Every row begins a
new document. Attention reads the bounds as numbers, so they stay in host memory, whatever device the batch is on.
"""

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

DOCUMENT_BOUNDS = "document_bounds"
"""Name of the batch field [D + 1] int32, which covers whole sequences even under context parallelism."""


def document_bounds(starts: torch.Tensor) -> torch.Tensor:
    """Returns the bounds [D + 1] int32, in host memory, for marks [b, s]."""
    # Use numpy, because a rehearsal can read the values of a tensor only if it was made from an array; there, each
    # row is one document.
    marks = starts.cpu().numpy().copy()
    marks[:, 0] = True
    return torch.from_numpy(np.append(np.flatnonzero(marks), marks.size).astype(np.int32))


def document_lengths(bounds: torch.Tensor, length: int) -> torch.Tensor:
    """Returns for each token the number of tokens of its document, [s, b] fp32, in host memory.

    Args:
        bounds: [D + 1].
        length: s, the number of tokens of a whole sequence.
    """
    sizes = np.diff(bounds.tolist())
    by_sequence = np.repeat(sizes, sizes).reshape(-1, length)
    return torch.from_numpy(np.ascontiguousarray(by_sequence.T, dtype=np.float32))


def packed_documents(bounds: torch.Tensor, length: int) -> PackedSeqParams:
    """Returns the bounds in the form in which megatron-core passes them from the model to every layer's core
    attention.

    The engine takes the length of its rotary table from `max_seqlen_q` and `max_seqlen_kv`. It leaves tensors in the
    format `sbhd`, [s, b, n, d], unchanged.

    Args:
        bounds: [D + 1].
        length: s, the number of tokens of a whole sequence.
    """
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )


def forbidden_pairs(bounds: torch.Tensor, length: int, *, causal: bool) -> torch.Tensor:
    """Returns the mask [b, 1, s, s], True if attention is forbidden, for implementations that need a mask.

    Args:
        bounds: [D + 1].
        length: s, the number of tokens of a sequence.
        causal: whether attention is causal.
    """
    documents = torch.arange(bounds.numel() - 1).repeat_interleave(bounds.diff()).view(-1, length)
    forbidden = documents.unsqueeze(2) != documents.unsqueeze(1)
    if causal:
        forbidden |= torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    return forbidden.unsqueeze(1)
