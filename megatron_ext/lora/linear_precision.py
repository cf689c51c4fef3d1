"""The precision of the linear layers in a stack (a group of consecutive layers that is trained or frozen as a whole).

The precision determines the storage of frozen weights and the dtype of the matrix products:

    precision    frozen weights    products
    full         fp32              fp32
    half         fp16              fp16
    bfloat16     bf16              bf16
    qlora        NF4, 4 bits       in the run's precision; see `four_bit_weights`
    nvfp4        NVFP4, 4 bits     in the run's precision

A linear layer casts its input to the stack's precision, multiplies, and casts the output back. Everything between the
linear layers (residual stream, norms, attention), biases and the tensors between pipeline stages stay in the run's
precision, so stacks of different precisions can follow one another. A linear layer with a frozen weight saves no
activation. A trained weight is stored in the run's precision (with `full`, in fp32) and cast for the product; its
gradient has the dtype of the stored weight.

For example, with --bf16 a stack of precision `full` multiplies in fp32, but its norms, biases and adapters are in
bf16.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

Precision = Literal["full", "half", "bfloat16", "nvfp4", "qlora"]
"""Names of the precisions, as in docs/design/progressive_growth.md."""

_COMPUTE = {"full": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def compute_dtype(precision: str | None, run_dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a stack's matrix products: the run's dtype for four-bit weights and for None."""
    return _COMPUTE.get(precision or "", run_dtype)


class _MixedLinear(torch.autograd.Function):
    """Computes x W^T in a dtype that may differ from that of x.

    The weight is read (and unpacked) again in the backward pass, so that no copy in `dtype` is saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        read: Callable[[torch.dtype], torch.Tensor],
        dtype: torch.dtype,
        group: Any,
    ) -> torch.Tensor:
        ctx.read, ctx.dtype, ctx.group = read, dtype, group
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        low = x.to(dtype)
        ctx.save_for_backward(low if ctx.needs_input_grad[1] else None)
        return _product(low, read(dtype).t()).to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        (low,) = ctx.saved_tensors
        grad, scale = _in_range(grads[0], ctx.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad, ctx.read(ctx.dtype)).to(ctx.x_dtype)
            if scale is not None:
                grad_x *= scale
            if ctx.group is not None:
                dist.all_reduce(grad_x, group=ctx.group)
        if low is not None:
            grad_weight = _product(grad.flatten(0, -2).t(), low.flatten(0, -2)).to(ctx.weight_dtype)
            if scale is not None:
                grad_weight *= scale
        return grad_x, grad_weight, None, None, None


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns the matrix product, accumulated in fp32."""
    # On a CPU, torch's fp16 product takes 25 times as long as an fp32 product.
    if left.dtype is torch.float16 and left.device.type == "cpu":
        return (left.float() @ right.float()).half()
    return left @ right


def _in_range(grad: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Casts a gradient to `dtype`. For fp16, the gradient is first divided by a power of two, which is returned as
    well.
    """
    # Gradients of a mean over thousands of tokens are below fp16's range. After the division, the largest value is in
    # [0.5, 1). The product is later multiplied by the same power, which is exact, so no loss scale is needed.
    if dtype is not torch.float16 or grad.dtype is torch.float16:
        return grad.to(dtype), None
    largest = grad.abs().max().float()
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0)).exponent
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    return (grad / scale).to(dtype), scale.to(grad.dtype)


def mixed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    read: Callable[[torch.dtype], torch.Tensor],
    dtype: torch.dtype,
    *,
    reduce_group: Any = None,
) -> torch.Tensor:
    """Computes x W^T in `dtype`.

    Args:
        x: [s, b, input].
        weight: the stored weight, possibly packed; gets a gradient if it requires one.
        read: returns the weight [output, input] in a given dtype; called in the forward and in the backward pass.
        dtype: dtype of the product.
        reduce_group: the gradient of x is summed over this group, as in the engine's column-parallel layer; None for
            no sum.

    Returns:
        [s, b, output] in the dtype of x.
    """
    return _MixedLinear.apply(x, weight, read, dtype, reduce_group)
