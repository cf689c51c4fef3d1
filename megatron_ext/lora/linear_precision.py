"""The precision of a stack: how its linear layers store frozen weights and compute, and the casts at their seams.

    full       fp32           half       fp16           bfloat16   bf16
    qlora      NF4 weights    nvfp4      NVFP4 weights  both computed in the run's precision; see `quantization`

A linear layer casts its input to the stack's precision, multiplies, and casts the output back. What lies between the
linear layers - residual stream, norms, attention - and what passes between pipeline stages stays in the run's
precision, so stacks of any precision follow one another. Biases and norms, a thousandth of the weights, do too.

    frozen weight      stored in the stack's precision; the backward pass keeps it alone, no activation
    trained weight     stored in the run's precision, in a stack of full precision in fp32, and cast for the product;
                       its gradient comes back in its own

So under --bf16 a stack of full precision is one in fp32 between casts, but for its norms, biases and adapters.

fp16 loses small gradients: those of a mean over thousands of tokens lie below its range. So the output's gradient is
divided by a power of two near its largest value before the product, and the result multiplied by it; exact but for
fp16's own rounding, and no loss scale is needed.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist

Precision = Literal["full", "half", "bfloat16", "nvfp4", "qlora"]
"""Document 004's names."""

_COMPUTE = {"full": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


def compute_dtype(precision: str | None, run_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a stack's linear layers multiply; the run's for packed weights and for None."""
    return _COMPUTE.get(precision or "", run_dtype)


class _MixedLinear(torch.autograd.Function):
    """x W^T in another precision than that of x; W is given as stored and read again in the backward pass."""

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
    """The matrix product, summed in fp32. A CPU's own fp16 product takes 25 times as long as one in fp32."""
    if left.dtype is torch.float16 and left.device.type == "cpu":
        return (left.float() @ right.float()).half()
    return left @ right


def _in_range(grad: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradient in `dtype`; for fp16 divided by a power of two (in [0.5, 1) at its largest), which is returned."""
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
    """x W^T in `dtype`, returned in the precision of x.

    Args:
        x: [s, b, input].
        weight: the weight as it is stored; gets a gradient if it requires one.
        read: gives the weight [output, input] in a dtype; called in the forward and in the backward pass.
        dtype: of the product.
        reduce_group: sum the gradient of x over this group, as the engine's column-parallel layer does.
    """
    return _MixedLinear.apply(x, weight, read, dtype, reduce_group)
