"""Gives a tensor the strides of a new tensor, so that a product with a frozen weight stays one matrix product.

With a batch of one, a transposed tensor [s, 1, h] counts as contiguous, but has the strides (h, s h, 1), not (h, h, 1).
With such a tensor and a weight that requires no gradient, torch.matmul computes s products of one row each: on
a CPU ten times slower than one product of s rows.
"""

import torch


def plain_strides(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view with the strides of a new tensor, whose gradient has them too; another tensor as it is.

    Args:
        tensor: of any shape; only a contiguous tensor is changed.
    """
    return tensor.view(-1).view(tensor.shape) if tensor.is_contiguous() else tensor
