"""Adds a low-rank product to a tensor in place, for example a weight delta's contribution to a linear layer's output.

    total[..., start : start + n] += u @ B              u: [..., r], B: [r, n]

Adding two linear layers would allocate the product at the output's size and the sum as a third tensor. Here the product
is accumulated into the base layer's output, and the backward pass saves only u and B.
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
        # `part` is both addend and output, so one GEMM accumulates into it without a temporary tensor of the output's
        # size.
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
    """Adds `coefficients @ factor` to the columns `start` to `start + n` of `total`.

    Args:
        total: [s, b, m], contiguous. It is modified in place unless it is a view, so no other operation may have saved
            it for its backward pass.
        coefficients: [s, b, r].
        factor: [r, n] with `n <= m - start`.
        start: first of the n columns.

    Returns:
        The sum [s, b, m]: `total` itself, or a copy if `total` was a view.
    """
    if total._is_view():
        # The tensor-parallel reduction and Transformer Engine return views, which must not be modified in place under
        # autograd.
        total = total.clone()
    return _AddProduct.apply(total, coefficients, factor, start)
