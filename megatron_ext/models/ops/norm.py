"""LayerNorm and RMSNorm that work under sequence parallelism.

    RMSNorm(x) = x / sqrt(mean(x^2) + eps) * weight        (arXiv 1910.07467)

megatron-core's `WrappedTorchNorm` refuses sequence parallelism. Shapes: input and output [..., h], parameters [h].
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.platform import process_groups


class _CpuRMSNorm(torch.autograd.Function):
    """RMSNorm in few passes over memory; on a CPU torch's own RMSNorm takes four times as long."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        values = hidden_states.float()
        inverse_rms = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
        inverse_rms = inverse_rms.div_(values.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_states, weight, inverse_rms)
        return (values * inverse_rms).mul_(weight).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_states, weight, inverse_rms = ctx.saved_tensors
        grad = grads[0].float()
        normed = hidden_states.float() * inverse_rms
        product = grad * normed
        rows = product.reshape(-1, product.size(-1))
        grad_weight = rows.sum(0).to(weight.dtype)
        # The mean over h of (grad * weight * normed) as one matrix-vector product, which saves a pass over memory.
        projection = (rows @ weight.float()).view_as(inverse_rms) / rows.size(-1)
        grad_input = torch.mul(grad, weight, out=product).sub_(normed.mul_(projection)).mul_(inverse_rms)
        return grad_input.to(hidden_states.dtype), grad_weight, None


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Applies RMSNorm over the last dimension; computes in fp32 and returns the input's dtype.

    Args:
        hidden_states: [..., h].
        weight: [h].
        eps: added to the mean square before the root.
    """
    if hidden_states.is_cuda:
        return F.rms_norm(hidden_states, weight.shape, weight.to(hidden_states.dtype), eps)
    return _CpuRMSNorm.apply(hidden_states, weight, eps)


class RMSNorm(torch.nn.Module):
    """RMSNorm (formula at the top of this file) with megatron-core's norm interface."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(_constant(config, hidden_size, 1.0))
        _mark(config, self.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalizes the last dimension, [..., h] -> [..., h]."""
        return rms_norm(hidden_states, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """LayerNorm (arXiv 1607.06450) with megatron-core's norm interface."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(_constant(config, hidden_size, 1.0))
        self.bias = torch.nn.Parameter(_constant(config, hidden_size, 0.0))
        _mark(config, self.weight, self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalizes the last dimension, [..., h] -> [..., h]."""
        return F.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.eps)


class Norm:
    """Layer-spec entry that builds the norm named by `config.normalization`."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        """Returns an `RMSNorm` or a `LayerNorm` over `hidden_size`."""
        kinds = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
        return kinds[config.normalization](config=config, hidden_size=hidden_size, eps=eps)


def _constant(config: TransformerConfig, size: int, value: float) -> torch.Tensor:
    return torch.full((size,), value, dtype=config.params_dtype, device=process_groups.device())


def _mark(config: TransformerConfig, *parameters: torch.nn.Parameter) -> None:
    # Under sequence parallelism each tensor-parallel rank sees part of the sequence: the engine sums the gradients of
    # parameters with this attribute over those ranks.
    for parameter in parameters:
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
