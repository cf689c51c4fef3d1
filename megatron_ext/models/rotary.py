"""Rotary position embedding in few passes over memory.

    [x1 ; x2] -> [x1 cos - x2 sin ; x2 cos + x1 sin]                 (arXiv 2104.09864, halves as in GPT-NeoX and Llama)

Equal to the engine's own to the bit, which builds a rotated copy of its input and joins parts that need no joining.
Shapes: input [s, b, n, d]; cos and sin [s, 1, 1, r / 2]; only the first r of the d values of a head are rotated.
"""

from typing import Any

import torch


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(values, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates queries or keys.

    Args:
        values: [s, b, n, d].
        cos: [s, 1, 1, r / 2], in the precision of `values`.
        sin: likewise.

    Returns:
        [s, b, n, d].
    """
    return _Rotate.apply(values, cos, sin)


def _rotated(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.size(-1)
    first, second, rest = values.split([half, half, values.size(-1) - 2 * half], dim=-1)
    result = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    torch.mul(first, cos, out=result[..., :half]).sub_(second * sin)
    torch.mul(second, cos, out=result[..., half : 2 * half]).add_(first * sin)
    result[..., 2 * half :] = rest
    return result
