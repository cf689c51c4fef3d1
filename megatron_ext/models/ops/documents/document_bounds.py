"""Where documents begin in the sequences of a micro-batch, as batch fields and as megatron-core passes it to attention.

A dataset marks each document's first token. The marks of a micro-batch [b, s] become bounds: the positions of these
tokens in the rows laid end to end, and b * s at the end, D + 1 numbers for D documents. A row begins a document.
Attention reads the bounds as numbers, so they stay in host memory, whatever device the batch is on.
"""

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

DOCUMENT_BOUNDS = "document_bounds"
"""Name of the batch field [D + 1] int32, which covers whole sequences even under context parallelism."""


def document_bounds(starts: torch.Tensor) -> torch.Tensor:
    """Returns the bounds [D + 1] int32, in host memory, for marks [b, s]."""
    # By numpy, because a rehearsal can read a tensor that is made of an array; each of its rows is one document.
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
    """Returns what megatron-core hands from the model to every layer's core attention.

    The engine sizes its rotary table by the two maxima and leaves the format `sbhd`, [s, b, n, d], as it is.

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
    """Returns the mask [b, 1, s, s] of this attention, True where it is forbidden, for attention that needs one.

    Args:
        bounds: [D + 1].
        length: s, the number of tokens of a sequence.
        causal: whether a token attends to no later ones.
    """
    documents = torch.arange(bounds.numel() - 1).repeat_interleave(bounds.diff()).view(-1, length)
    forbidden = documents.unsqueeze(2) != documents.unsqueeze(1)
    if causal:
        forbidden |= torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    return forbidden.unsqueeze(1)
