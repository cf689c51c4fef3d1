"""A reference, in plain torch, of those functions of `transformer_engine_torch` that this project's models call.

Transformer Engine's Python code calls this compiled extension, which needs CUDA. The matrix product, the norms and
the optimizer's kernels are computed here as documented. Every other name is a mock; a computation with a mock's
result fails.
"""

import enum
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

Tensors = list[list[torch.Tensor]]


class DTypeNumber(enum.IntEnum):
    """Numbers of the dtypes, in the order of `transformer_engine.h`."""

    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


_TORCH = {
    DTypeNumber.kFloat32: torch.float32,
    DTypeNumber.kFloat16: torch.float16,
    DTypeNumber.kBFloat16: torch.bfloat16,
}


class FusedAttentionBackend(enum.IntEnum):
    """The kernels of fused attention. The reference has none, so Transformer Engine computes attention in torch."""

    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class Extension(ModuleType):
    """The module `transformer_engine_torch`; names that it does not define are mocks."""

    DType = DTypeNumber
    NVTE_Fused_Attn_Backend = FusedAttentionBackend
    __version__ = "3.6.0"  # as triton, for which this also stands in

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # `from transformer_engine_torch import *` reads the module's own dictionary.
        vars(self).update({key: getattr(self, key) for key in vars(Extension) if not key.startswith("_")})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        mock = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, mock)
        return mock

    @staticmethod
    def get_cudnn_version() -> int:
        return 91200

    @staticmethod
    def get_fused_attn_backend(*_: Any) -> FusedAttentionBackend:
        return FusedAttentionBackend.NVTE_No_Backend

    @staticmethod
    def generic_gemm(
        a: torch.Tensor,
        transposes_a: bool,
        b: torch.Tensor,
        transposes_b: bool,
        out: torch.Tensor | None,
        quantizer: Any,
        dtype: DTypeNumber | None,
        bias: torch.Tensor | None,
        bias_dtype: DTypeNumber,
        gelu: bool,
        gelu_in: Any,
        is_gradient: bool,
        workspace: torch.Tensor,
        workspace_bytes: int,
        accumulate: bool,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        """Returns the product op(b) op(a) of row-major matrices (for cuBLAS: op(a) op(b) of column-major matrices).

        A linear layer calls it three times. If only `a` is transposed (TN), the result is the layer's output; if
        neither is (NN), the input's gradient; if only `b` is (NT), the weight's gradient. For NT, a `bias` requests
        the bias's gradient too: the sum of the rows of the output's gradient.
        """
        assert quantizer is None and not gelu, "the reference computes no FP8 and no fused GELU"
        first = b.t() if transposes_b else b.flatten(0, -2)
        second = a.t() if transposes_a else a.flatten(0, -2)
        product = first @ second
        if bias is not None and not is_gradient:
            product = product + bias
        shape = product.shape if transposes_b else (*b.shape[:-1], product.shape[-1])
        product = product.view(shape)
        bias_gradient = b.flatten(0, -2).sum(0) if is_gradient and bias is not None else None
        if out is None:
            return (
                product.to(_TORCH[dtype] if dtype is not None else product.dtype),
                bias_gradient,
                None,
                None,
            )
        out.add_(product) if accumulate else out.copy_(product)
        return out, bias_gradient, None, None

    @staticmethod
    def swiglu(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate.float()).mul(up).to(x.dtype)

    @staticmethod
    def dswiglu(gradient: torch.Tensor, x: torch.Tensor, quantizer: Any) -> torch.Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        slope = torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
        return torch.cat([gradient * up * slope, gradient * F.silu(gate)], dim=-1).to(x.dtype)

    @staticmethod
    def fused_rope_forward(x: torch.Tensor, angles: torch.Tensor, *details: Any) -> torch.Tensor:
        """Rotates the first r features of x [s, b, n, d] by angles [s, 1, 1, r], whose two halves along r are equal."""
        starts, _, interleaved, lengths, ranks, _ = details
        assert starts is None and lengths is None and not interleaved and ranks == 1
        return _turned(x, angles, 1.0)

    @staticmethod
    def fused_rope_backward(gradient: torch.Tensor, angles: torch.Tensor, *_: Any) -> torch.Tensor:
        return _turned(gradient, angles, -1.0)

    @staticmethod
    def rmsnorm_fwd(
        x: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        out: Any,
        quantizer: Any,
        dtype: DTypeNumber,
        sm_margin: int,
        zero_centered: bool,
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1) + epsilon)
        normed = x.float() * inverse[:, None] * _factor(weight, zero_centered)
        return normed.to(_TORCH[dtype]), None, inverse

    @staticmethod
    def rmsnorm_bwd(
        gradient: torch.Tensor,
        x: torch.Tensor,
        inverse: torch.Tensor,
        weight: torch.Tensor,
        sm_margin: int,
        zero_centered: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = x.float() * inverse[:, None]
        scaled = gradient.float() * _factor(weight, zero_centered)
        back = inverse[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return back.to(x.dtype), (gradient.float() * normed).sum(0).to(weight.dtype)

    @staticmethod
    def layernorm_fwd(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        epsilon: float,
        out: Any,
        quantizer: Any,
        dtype: DTypeNumber,
        sm_margin: int,
        zero_centered: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean = x.float().mean(-1)
        inverse = torch.rsqrt(x.float().var(-1, unbiased=False) + epsilon)
        factor = _factor(weight, zero_centered)
        normed = F.layer_norm(x.float(), weight.shape, factor, bias.float(), epsilon)
        return normed.to(_TORCH[dtype]), mean, inverse

    @staticmethod
    def layernorm_bwd(
        gradient: torch.Tensor,
        x: torch.Tensor,
        mean: torch.Tensor,
        inverse: torch.Tensor,
        weight: torch.Tensor,
        sm_margin: int,
        zero_centered: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = (x.float() - mean[:, None]) * inverse[:, None]
        scaled = gradient.float() * _factor(weight, zero_centered)
        centred = scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True)
        of_weight = (gradient.float() * normed).sum(0)
        return (
            (inverse[:, None] * centred).to(x.dtype),
            of_weight.to(weight.dtype),
            gradient.float().sum(0).to(weight.dtype),
        )

    @staticmethod
    def multi_tensor_scale(_: int, skip: torch.Tensor, tensors: Tensors, scale: float) -> None:
        for source, target in zip(*tensors, strict=True):
            target.copy_(source * scale)

    @staticmethod
    def multi_tensor_l2norm(
        _: int, skip: torch.Tensor, tensors: Tensors, per_tensor: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norms = torch.stack([tensor.float().norm() for tensor in tensors[0]])
        return norms.norm().view(1), norms if per_tensor else norms[:0]

    @staticmethod
    def multi_tensor_adam(
        _: int,
        skip: torch.Tensor,
        tensors: Tensors,
        rate: float,
        beta1: float,
        beta2: float,
        epsilon: float,
        step: int,
        decoupled: int,
        corrects_bias: int,
        weight_decay: float,
    ) -> None:
        """Applies AdamW to lists of gradients, parameters and both moments."""
        assert decoupled and corrects_bias, "the reference computes AdamW with bias correction"
        for gradient, parameter, first, second in zip(*tensors[:4], strict=True):
            first.lerp_(gradient.to(first.dtype), 1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (second / (1 - beta2**step)).sqrt().add_(epsilon)
            update = first / (1 - beta1**step) / denominator + weight_decay * parameter
            parameter.sub_(rate * update)


def _factor(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    """Returns the factor of a norm from its stored weight, which is the factor minus 1 if `zero_centered`."""
    return weight.float() + float(zero_centered)


def _turned(x: torch.Tensor, angles: torch.Tensor, sign: float) -> torch.Tensor:
    size = angles.size(-1)
    rotated, rest = x.float()[..., :size], x[..., size:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * angles.cos() + sign * torch.cat([-second, first], dim=-1) * angles.sin()
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
