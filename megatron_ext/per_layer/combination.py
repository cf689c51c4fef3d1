"""From the word embedding and the per-layer ids to one vector a layer, and the three ways to combine the two.

    P[l] = RMSNorm_p( (e @ W_ctx_l) * h**-0.5 )          E[l] = table_l[id] * sqrt(p) * embed_scale

    scaled_add   c = (P + E) / sqrt(2)
    concat       c = [P ; E] @ W_cat
    gated        c = g * E + (1 - g) * P,   g = sigmoid([P ; E] @ W_g)

Letters: L layers of the stage, n = s * b tokens, h hidden, p per-layer hidden, q = p / t of this tensor-parallel rank.
Sources: Gemma 3n and Gemma 4 (scaled_add); document 003.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region

Group = dist.ProcessGroup
_HALF = (torch.bfloat16, torch.float16)


class _NormAcrossShards(torch.autograd.Function):
    """RMSNorm over p of which a rank has q values. The sums over p are completed over the ranks in both directions."""

    @staticmethod
    def forward(
        ctx: Any, projected: torch.Tensor, weight: torch.Tensor, eps: float, scale: float, group: Group
    ) -> torch.Tensor:
        values = _by_layer(projected, weight.numel())
        square_sum = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_()
        _sum_over(square_sum, group)
        inverse_rms = square_sum.div_(weight.numel() * group.size()).add_(eps).rsqrt_()
        ctx.save_for_backward(projected, weight, inverse_rms)
        ctx.scale, ctx.group = scale, group
        normed = torch.empty(values.shape, dtype=values.dtype, device=values.device)
        torch.mul(values, inverse_rms, out=normed).mul_(weight * scale)
        return normed.to(projected.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        projected, weight, inverse_rms = ctx.saved_tensors
        grad = _wide(grads[0])
        scaled_weight = weight.to(grad.dtype) * ctx.scale
        normed = torch.mul(_by_layer(projected, weight.numel()), inverse_rms)
        product = grad * normed
        # Mean over p of (grad * weight * normed).
        mean = (product @ scaled_weight).unsqueeze(-1)
        _sum_over(mean, ctx.group)
        mean.div_(weight.numel() * ctx.group.size())
        grad_weight = product.sum((0, 1)).mul_(ctx.scale).to(weight.dtype)
        # `normed` has the memory of `projected`, [n, L * q], which the result needs as well.
        normed.mul_(mean).neg_().addcmul_(grad, scaled_weight.expand_as(grad)).mul_(inverse_rms)
        grad_projected = normed.transpose(0, 1).reshape(projected.shape).to(projected.dtype)
        return grad_projected, grad_weight, None, None, None


def project(word_embedding: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """One GEMM for all layers: [s, b, h] and L weights [q, h] -> [n, L * q]."""
    tokens = word_embedding.reshape(-1, word_embedding.size(-1))
    return torch.nn.functional.linear(tokens, weights[0] if len(weights) == 1 else torch.cat(list(weights)))


def norm_across_shards(
    projected: torch.Tensor, weight: torch.Tensor, eps: float, *, scale: float, group: Group
) -> torch.Tensor:
    """RMSNorm over the whole p, times `scale`, in fp32.

    Args:
        projected: [n, L * q].
        weight: [q], the same for all layers.
        eps: added to the mean square.
        scale: a constant factor on the result.
        group: the ranks that share p.

    Returns:
        [L, n, q], contiguous, in the precision of `projected`.
    """
    return _NormAcrossShards.apply(projected, weight, eps, scale, group)


def look_up(ids: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of every layer's table: integer ids [s, b] and L tables [Vp, q] -> [L, n, q], unscaled."""
    return torch.stack([torch.nn.functional.embedding(ids.reshape(-1), table) for table in tables])


def gather_parts(context: torch.Tensor, token: torch.Tensor, group: Group) -> torch.Tensor:
    """[P ; E] over the whole p: two [L, n, q] -> [L, n, 2p]."""
    parts = torch.stack((context, token), dim=2)
    if group.size() > 1:
        parts = all_gather_last_dim_from_tensor_parallel_region(parts, group=group)
    return parts.flatten(2)


def multiply(parts: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every layer's own matrix: [L, n, 2p] and L weights [q, 2p] -> [L, n, q]."""
    return torch.bmm(parts, torch.stack(list(weights)).transpose(1, 2))


def _by_layer(projected: torch.Tensor, width: int) -> torch.Tensor:
    """[n, L * q] -> [L, n, q], a view where the precision allows it."""
    return _wide(projected).view(projected.size(0), -1, width).transpose(0, 1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _sum_over(tensor: torch.Tensor, group: Group) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
