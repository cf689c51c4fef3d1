"""Adds a low-rank product to a tensor in place: how a delta reaches what the base weights computed.

    total[..., start : start + n] += u @ B              u: [..., r], B: [r, n]

A sum of two linear layers would make the product as a tensor of the output's size, read both and write a third. Here
the product is accumulated where the base layer's output lies; the backward pass needs u and B alone.
"""

from typing import Any

import torch


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, total: torch.Tensor, coefficients: torch.Tensor, factor: torch.Tensor, start: int
    ) -> torch.Tensor:
        ctx.mark_dirty(total)
        ctx.save_for_backward(coefficients, factor)
        ctx.start = start
        part = _part(total, start, factor.size(1))
        torch.addmm(part, coefficients.reshape(-1, factor.size(0)), factor, out=part)
        return total

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None]:
        coefficients, factor = ctx.saved_tensors
        part = _part(grads[0], ctx.start, factor.size(1))
        grad_coefficients = grad_factor = None
        if ctx.needs_input_grad[1]:
            grad_coefficients = (part @ factor.t()).view_as(coefficients)
        if ctx.needs_input_grad[2]:
            grad_factor = coefficients.reshape(-1, factor.size(0)).t() @ part
        return grads[0], grad_coefficients, grad_factor, None


def _part(tensor: torch.Tensor, start: int, width: int) -> torch.Tensor:
    return tensor.reshape(-1, tensor.size(-1)).narrow(1, start, width)


def add_product(
    total: torch.Tensor, coefficients: torch.Tensor, factor: torch.Tensor, start: int = 0
) -> torch.Tensor:
    """`total` with `coefficients @ factor` added to columns `start` and on; `total` itself where that is possible.

    Args:
        total: [s, b, m], contiguous; nothing else may need its present values.
        coefficients: [s, b, r].
        factor: [r, n], n <= m - start.
        start: first column.
    """
    if total._is_view():
        # As a reduction over one's peers and Transformer Engine return it; autograd refuses to change such a view.
        total = total.clone()
    return _AddProduct.apply(total, coefficients, factor, start)
