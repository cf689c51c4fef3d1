"""Rotary position embedding in few passes over memory, and its frequencies with context-length scaling.

    [x1 ; x2] -> [x1 cos - x2 sin ; x2 cos + x1 sin]                 (arXiv 2104.09864, halves as in GPT-NeoX and Llama)

The result equals the engine's to the bit. The engine is slower because it builds a rotated copy of the input and
concatenates the rotated and the unrotated part. Shapes: input [s, b, n, d]; cos and sin [s, 1, 1, r / 2]; only the
first r of the d values of a head are rotated.
"""

from typing import Any

import torch

from megatron_ext.config.groups.model.layer_shapes import rotated_pairs
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.ops.positions.rope_scaling import depends_on_length, frequencies_at, scaled


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """Returns the angle per position of each channel pair, `base^(-2i/r)`, in radians, with the configured scaling.

    Linear scaling divides every frequency by a factor F (arXiv 2306.15595). The other scalings are in `rope_scaling`;
    for scalings that depend on the length of the sequence, the result is for sequences up to the original length.
    With a `rotary_proportion` below 1 the lowest frequencies are 0, so that these channels are not rotated (Gemma 4).

    Returns:
        [r / 2], fp32, on the CPU. If layers with a window have a separate embedding, the frequencies of all other
        layers come first, then those of layers with a window. The latter are not scaled if they have a separate base.
    """
    full, local = _rotated_channels(model)
    frequencies = _unscaled(full, model.rotary_base)
    if model.rotary_proportion != 1.0:
        frequencies[rotated_pairs(full, model.rotary_proportion) :] = 0.0
    frequencies = _scaled(model, frequencies)
    if not model.has_two_rotaries:
        return frequencies
    if model.rotary_base_local is not None:
        return torch.cat([frequencies, _unscaled(local, model.rotary_base_local)])
    return torch.cat([frequencies, _scaled(model, _unscaled(local, model.rotary_base))])


def rotary_part(model: ModelConfig, number: int) -> tuple[int, int] | None:
    """Returns the start and the number of a layer's frequencies in `rotary_frequencies`; None if it uses all.

    Args:
        model: configuration of the base model.
        number: the layer's number, counted from 0 over the whole model.
    """
    if not model.has_two_rotaries:
        return None
    full, local = (rotated // 2 for rotated in _rotated_channels(model))
    return (0, full) if model.layers[number].window is None else (full, local)


def _rotated_channels(model: ModelConfig) -> tuple[int, int]:
    """Returns r for layers without a sliding window, and r for layers with one."""
    channels = model.resolved_kv_channels
    full = channels if model.kv_channels_full is None else model.kv_channels_full
    return int(full * model.rotary_percent), int(channels * model.rotary_percent)


def _unscaled(rotated: int, base: float) -> torch.Tensor:
    return 1.0 / base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def _scaled(model: ModelConfig, frequencies: torch.Tensor) -> torch.Tensor:
    if model.rotary_seq_len_interpolation_factor is not None:
        return frequencies / model.rotary_seq_len_interpolation_factor
    if not model.use_rope_scaling:
        return frequencies
    if depends_on_length(model):
        return frequencies_at(model, torch.tensor([1])).squeeze(0)
    return scaled(model, frequencies)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(values, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The transpose of a rotation is the rotation by the negative angle.
        return _rotated(grads[0], cos, -sin), None, None


def rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates queries or keys.

    Args:
        values: [s, b, n, d].
        cos: [s, 1, 1, r / 2] or [s, b, 1, r / 2], in the dtype of `values`.
        sin: of the same shape and dtype.

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
