"""Cross-entropy over the full vocabulary (tensor-parallel size 1), in few passes over the logits.

    loss = log(sum_v exp(z_v)) - z_label,   d loss / d z = softmax(z) - onehot(label)

The forward pass processes blocks of rows, computes in fp32, and saves the softmax in the logits' precision for the
backward pass. With tensor parallelism the vocabulary is split over ranks and megatron-core's vocabulary-parallel
cross-entropy is used instead. Shapes: logits [..., V], labels [...], losses [...] in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch

BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Bytes of one block's fp32 values: fits into a CPU's cache, or is a small part of a GPU's memory."""


def blocks(rows: torch.Tensor, device: str | None = None) -> Iterator[slice]:
    """Yields slices that divide rows of logits, [n, V], into blocks, so that temporary fp32 values stay small.

    Args:
        rows: the logits.
        device: `cpu` or `cuda`, whose block size is used; None for the device of `rows`.
    """
    step = max(1, BLOCK_BYTES[device or rows.device.type] // (4 * rows.size(1)))
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = logits.reshape(-1, logits.size(-1))
        index = labels.reshape(-1, 1)
        softmax = torch.empty_like(rows)
        losses = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
        for block in blocks(rows):
            log_probabilities = torch.log_softmax(rows[block], dim=-1, dtype=torch.float32)
            losses[block] = log_probabilities.gather(-1, index[block]).squeeze(-1).neg_()
            softmax[block] = log_probabilities.exp_()
            del log_probabilities  # otherwise two blocks would exist at once
        ctx.save_for_backward(softmax, index)
        ctx.shape = logits.shape
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        softmax, index = ctx.saved_tensors
        scale = grads[0].reshape(-1, 1).to(softmax.dtype)
        # In place, because the softmax is as large as the logits.
        grad = softmax.mul_(scale)
        grad.scatter_add_(-1, index, scale.neg())
        return grad.view(ctx.shape), None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Computes the loss of each label.

    The backward pass overwrites the saved softmax, so it can run only once.

    Args:
        logits: [..., V].
        labels: [...], integers in [0, V).

    Returns:
        Losses [...], fp32.
    """
    return _CrossEntropy.apply(logits, labels)
