"""Cross-entropy of a vocabulary that is whole on every rank, in few passes over the logits.

    loss = log(sum_v exp(z_v)) - z_label,   d loss / d z = softmax(z) - onehot(label)

With tensor parallelism the vocabulary is split, and megatron-core's vocabulary-parallel cross-entropy is used instead.
Shapes: logits [..., V], labels [...], losses [...] in fp32.
"""

from typing import Any

import torch


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        index = labels.unsqueeze(-1)
        losses = log_probabilities.gather(-1, index).squeeze(-1).neg_()
        ctx.save_for_backward(log_probabilities, index)
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_probabilities, index = ctx.saved_tensors
        scale = grads[0].unsqueeze(-1)
        grad = log_probabilities.exp_().mul_(scale)
        grad.scatter_add_(-1, index, scale.neg())
        return grad.to(ctx.dtype), None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Losses [...] of labels [...] under logits [..., V]. Backward may run once: it works in place."""
    return _CrossEntropy.apply(logits, labels)
