"""LayerNorm and RMSNorm that work under sequence parallelism, and an RMSNorm over the heads of all tensor ranks.

    RMSNorm(x) = x / sqrt(mean(x^2) + eps) * weight        (arXiv 1910.07467)

With `layernorm_zero_centered_gamma` (--apply-layernorm-1p) a norm's parameter is weight - 1.

megatron-core's `WrappedTorchNorm` refuses sequence parallelism. Shapes: input and output [..., h], parameters [h].
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_ext.platform import process_groups


class _CpuRMSNorm(torch.autograd.Function):
    """RMSNorm in few passes over memory; on a CPU torch's own RMSNorm takes four times as long."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed = _normalize(ctx, hidden_states, weight, eps)
        return normed.mul_(weight).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *_norm_gradients(ctx, grads[0]), None


class _CpuAddedRMSNorm(torch.autograd.Function):
    """Adds the RMSNorm of some values to a residual stream; saves passes over memory compared with separate
    operations.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        normed = _normalize(ctx, hidden_states, weight, eps)
        if residual.dtype == hidden_states.dtype == torch.float32:
            # `addcmul` would save a pass, but its fused product and sum round differently from Hugging Face's modules.
            return normed.mul_(weight).add_(residual)
        return residual + normed.mul_(weight).to(residual.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        return grads[0], *_norm_gradients(ctx, grads[0]), None


def _normalize(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns the values over their RMS, in fp32; saves what `_norm_gradients` needs."""
    values = hidden_states.float()
    inverse_rms = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
    inverse_rms = inverse_rms.div_(values.size(-1)).add_(eps).rsqrt_()
    ctx.save_for_backward(hidden_states, weight, inverse_rms)
    return values * inverse_rms


def _norm_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of values and weight; with r = 1 / rms(x), they are

    dx = r (g w) - x r^3 mean(g w x)        dw = sum over rows of r g x

    """
    hidden_states, weight, inverse_rms = ctx.saved_tensors
    grad, values, scale = gradient.float(), hidden_states.float(), inverse_rms.flatten()
    product = grad * values
    rows = product.reshape(-1, product.size(-1))
    grad_weight = (rows.t() @ scale).to(weight.dtype)
    # These are matrix-vector products, which need no additional pass over memory.
    mean = (rows @ weight.float()).mul_(scale.pow(3)).div_(rows.size(-1)).view_as(inverse_rms)
    grad_input = torch.mul(grad, weight, out=product).mul_(inverse_rms).addcmul_(values, mean, value=-1)
    return grad_input.to(hidden_states.dtype), grad_weight


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Applies RMSNorm over the last dimension; computes in fp32 and returns the input's dtype.

    Args:
        hidden_states: [..., h].
        weight: [h].
        eps: added to the mean square before the root.
    """
    if hidden_states.is_cuda and weight.dtype != hidden_states.dtype:
        # The weight is in fp32 here, because in bf16 a weight around 1 would lose half of its bits.
        return F.rms_norm(hidden_states.float(), weight.shape, weight, eps).to(hidden_states.dtype)
    if hidden_states.is_cuda:
        return F.rms_norm(hidden_states, weight.shape, weight, eps)
    return _CpuRMSNorm.apply(hidden_states, weight, eps)


def add_rms_norm(
    residual: torch.Tensor, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Returns residual + RMSNorm(hidden_states), both [..., h]; for the other arguments, see `rms_norm`."""
    if hidden_states.is_cuda:
        return residual + rms_norm(hidden_states, weight, eps)
    return _CpuAddedRMSNorm.apply(residual, hidden_states, weight, eps)


def unit_rms(values: torch.Tensor, eps: float) -> torch.Tensor:
    """Applies RMSNorm without a weight over the last dimension, in fp32; returns the input's dtype."""
    return F.rms_norm(values.float(), values.shape[-1:], None, eps).to(values.dtype)


def full_weight(norm: Any) -> torch.Tensor:
    """Returns the weight [h] of a norm, this package's or Transformer Engine's; in fp32 if weight - 1 is stored."""
    is_centered = getattr(norm, "zero_centered", None)
    if is_centered is None:
        is_centered = getattr(norm, "zero_centered_gamma", False)
    weight: torch.Tensor = norm.weight
    return weight.float() + 1.0 if is_centered else weight


class WeightedNorm(torch.nn.Module):
    """A norm with a weight [h] and megatron-core's norm interface.

    Args:
        config: megatron-core's transformer configuration.
        hidden_size: size of the last dimension.
        eps: added to the mean square, or the variance, before the root.
        zero_centered: whether the parameter is weight - 1; None for the configuration's setting.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        zero_centered: bool | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma if zero_centered is None else zero_centered
        self.weight = replicated_parameter(config, hidden_size, value=0.0 if self.zero_centered else 1.0)


class RMSNorm(WeightedNorm):
    """RMSNorm (formula at the top of this file); arguments as for `WeightedNorm`."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Normalizes the last dimension; if `residual` is given, adds the result to it. All shapes are [..., h]."""
        if residual is not None:
            return add_rms_norm(residual, hidden_states, full_weight(self), self.eps)
        return rms_norm(hidden_states, full_weight(self), self.eps)


class LayerNorm(WeightedNorm):
    """LayerNorm (arXiv 1607.06450); arguments as for `WeightedNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, *args, **kwargs)
        self.bias = replicated_parameter(config, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalizes the last dimension, [..., h] -> [..., h]."""
        if self.zero_centered:
            # The weight is in fp32 here, because in bf16 a weight around 1 would lose half of its bits.
            exact = F.layer_norm(
                hidden_states.float(), self.weight.shape, full_weight(self), self.bias.float(), self.eps
            )
            return exact.to(hidden_states.dtype)
        return F.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.eps)


class _RMSNormOverRanks(torch.autograd.Function):
    """RMSNorm over a last dimension that is divided among the ranks of a group."""

    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, weight: torch.Tensor, eps: float, width: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        values = part.float()
        inverse_rms = _summed(values.square(), group).div_(width).add_(eps).rsqrt_()
        ctx.save_for_backward(part, weight, inverse_rms)
        ctx.width, ctx.group = width, group
        return (values * inverse_rms).mul_(weight).to(part.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        part, weight, inverse_rms = ctx.saved_tensors
        grad, normed = grads[0].float(), part.float() * inverse_rms
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        projection = _summed(product.mul_(weight), ctx.group).div_(ctx.width)
        grad_input = (grad * weight).sub_(normed.mul_(projection)).mul_(inverse_rms)
        return grad_input.to(part.dtype), grad_weight, None, None, None


def _summed(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = values.sum(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over all heads of a token together, which are divided among the tensor-parallel ranks.

    The weight is split over the ranks like the heads.

    Args:
        config: megatron-core's transformer configuration.
        hidden_size: width of one head, d.
        eps: added to the mean square before the root.
        heads: number of heads over all ranks, N; must be a multiple of the number of ranks t.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        ranks = self.group.size()
        assert heads % ranks == 0, (
            f"{ranks} tensor-parallel ranks cannot share {heads} heads (--qk-projection-norm)"
        )
        self.eps, self.width = eps, heads * hidden_size
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = replicated_parameter(
            config, self.width // ranks, value=0.0 if self.zero_centered else 1.0
        )
        # Each rank has the whole sequence here, so the weight's gradient is complete.
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Normalizes queries or keys, [s, b, N/t, d] -> [s, b, N/t, d]."""
        normed = _RMSNormOverRanks.apply(
            heads.flatten(2), full_weight(self), self.eps, self.width, self.group
        )
        return normed.view(heads.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describes the weight as one tensor [N d] that is split over the tensor-parallel ranks."""
        state = {"weight": self.weight}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class Norm:
    """Layer-spec entry that builds the norm named by `config.normalization`."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        """Returns an `RMSNorm` or a `LayerNorm` over `hidden_size`."""
        kinds = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
        return kinds[config.normalization](config=config, hidden_size=hidden_size, eps=eps)


def replicated_parameter(config: TransformerConfig, *shape: int, value: float = 0.0) -> torch.nn.Parameter:
    """Returns a parameter, filled with `value`, that every tensor-parallel rank holds completely."""
    start = torch.full(shape, value, dtype=config.params_dtype, device=process_groups.device())
    parameter = torch.nn.Parameter(start)
    # Under sequence parallelism each tensor-parallel rank sees part of the sequence: the engine sums the gradients of
    # parameters with this attribute over those ranks.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter
