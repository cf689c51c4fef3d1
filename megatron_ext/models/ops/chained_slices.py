"""Takes slices of one tensor and adds the slices' gradients into a single buffer.

The backward pass of a plain slice allocates a zero-filled tensor of full size for every slice. Here, one buffer
passes through the chain of slices in the backward pass, and each slice adds its gradient to the buffer in place.
"""

from typing import Any

import torch


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, dim: int, start: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.place, ctx.shape = (dim, start, size), tensor.shape
        ctx.set_materialize_grads(False)  # a missing gradient stays None instead of a tensor of zeros
        return tensor.narrow(dim, start, size), tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None]:
        grad, later = grads
        if grad is None:
            return later, None, None, None
        if later is None:
            later = grad.new_zeros(ctx.shape)
        later.narrow(*ctx.place).add_(grad)
        return later, None, None, None


def take_slice(tensor: torch.Tensor, dim: int, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a view of the rows `start` to `start + size` of dimension `dim`, and the tensor for the next slice.

    Args:
        tensor: tensor of any shape; for later slices, the second result of the previous call.
        dim: dimension that is sliced.
        start: first row.
        size: number of rows.
    """
    taken, rest = _Slice.apply(tensor, dim, start, size)
    return taken, rest
