"""Replaces operations for which the fake device would save other tensors for the backward pass than CUDA's kernels do.

    attention    flash, memory-efficient or unfused, as torch chooses on a GPU; saves the same tensors as that kernel
    rms_norm     one kernel, which saves its input and 1 / rms
    compiled     functions given to torch.compile run uncompiled, so their intermediate tensors are counted

The results have the right shapes and types, but no values.
"""

from typing import Any

import torch
from torch.nn.attention.bias import CausalBias

aten = torch.ops.aten
_LARGEST_FLASH_HEAD = 256
_HALF = (torch.float16, torch.bfloat16)


def install() -> None:
    """Replaces the functions, for the rest of this process."""
    functional: Any = torch.nn.functional
    functional.scaled_dot_product_attention = _attention(functional.scaled_dot_product_attention)
    biased: Any = CausalBias
    biased._dispatch = _at_the_last_key
    functional.rms_norm = _rms_norm(functional.rms_norm)
    module: Any = torch
    module.compile = lambda function, **_: function


def _attention(otherwise: Any) -> Any:
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if not query.is_cuda:
            result: torch.Tensor = otherwise(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return result
        half = query.dtype in _HALF
        if half and attn_mask is None and query.size(-1) <= _LARGEST_FLASH_HEAD:
            flash = aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if not enable_gqa:
            return _efficient(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return _unfused(query, key, value, attn_mask, dropout_p, is_causal, scale)

    return attention


def _at_the_last_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Any,
    dropout: float,
    *,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Computes attention with the mask `causal_lower_right` of torch."""
    is_fused = query.dtype in _HALF or not enable_gqa
    mask = None if is_fused else bias._materialize(query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_fused, scale=scale, enable_gqa=enable_gqa
    )


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    kernel = aten._scaled_dot_product_efficient_attention
    bias = None if mask is None else _bias(mask, query.dtype)
    return kernel(query, key, value, bias, query.requires_grad, dropout, is_causal, scale=scale)[0]


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the mask in the kernel's form: 0 where attention is allowed, otherwise minus infinity."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _unfused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    repeats = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    root = (query.size(-1) ** -0.5 if scale is None else scale) ** 0.5
    scores = (query * root) @ (key * root).transpose(-1, -2)
    if is_causal:
        allowed = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), float("-inf"))
    elif mask is not None:
        scores = scores + _bias(mask, scores.dtype)
    weights = torch.softmax(scores, -1)
    return (torch.dropout(weights, dropout, True) if dropout else weights) @ value


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inverse = torch.empty((*values.shape[:-1], 1), dtype=torch.float32, device=values.device)
        ctx.save_for_backward(values, weight, inverse)
        # An operation on both tensors, so that a weight on another device causes an error.
        return values * weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), torch.empty_like(weight)


def _rms_norm(otherwise: Any) -> Any:
    def rms_norm(
        values: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
    ) -> torch.Tensor:
        if values.is_cuda and weight is not None:
            return _FusedRMSNorm.apply(values, weight)
        result: torch.Tensor = otherwise(values, shape, weight, eps)
        return result

    return rms_norm
