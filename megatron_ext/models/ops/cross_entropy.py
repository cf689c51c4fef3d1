"""Cross-entropy of a vocabulary that is whole on every rank, in few passes over the logits.

    loss = log(sum_v exp(z_v)) - z_label,   d loss / d z = softmax(z) - onehot(label)

The forward pass goes through the logits in blocks of rows that stay in the cache, computes in fp32 and keeps the
softmax, in the logits' precision, for the backward pass. With tensor parallelism the vocabulary is split, and
megatron-core's vocabulary-parallel cross-entropy is used instead. Shapes: logits [..., V], labels [...], losses [...]
in fp32.
"""

from typing import Any

import torch

_BLOCK_BYTES = 1 << 21
"""fp32 values of a block on a CPU; a GPU takes all rows at once."""


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = logits.reshape(-1, logits.size(-1))
        index = labels.reshape(-1, 1)
        softmax = torch.empty_like(rows)
        losses = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
        step = len(rows) if logits.is_cuda else max(1, _BLOCK_BYTES // (4 * rows.size(1)))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            log_probabilities = torch.log_softmax(rows[block], dim=-1, dtype=torch.float32)
            losses[block] = log_probabilities.gather(-1, index[block]).squeeze(-1).neg_()
            softmax[block] = log_probabilities.exp_()
        ctx.save_for_backward(softmax, index)
        ctx.shape = logits.shape
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        softmax, index = ctx.saved_tensors
        scale = grads[0].reshape(-1, 1).to(softmax.dtype)
        grad = softmax.mul_(scale)
        grad.scatter_add_(-1, index, scale.neg())
        return grad.view(ctx.shape), None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses [...] of labels [...] under logits [..., V]. Backward may run once: it works in place."""
    return _CrossEntropy.apply(logits, labels)
