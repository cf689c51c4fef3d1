"""Combines the word embedding and the per-layer token embeddings into one vector per layer, in one of three ways.

For layer l, the context part P is projected from the word embedding e, and the token part E is a row of a table:

    P[l] = RMSNorm_p( (e @ W_ctx_l) * h**-0.5 )          E[l] = table_l[id] * sqrt(p) * embed_scale
                                                         with j ids per token:  sum of rows * sqrt(p / j) * embed_scale

The three methods compute the layer's vector c:

    scaled_add   c = (P + E) / sqrt(2)
    concat       c = [P ; E] @ W_cat
    gated        c = g * E + (1 - g) * P,   g = sigmoid([P ; E] @ W_g)

Letters: L layers of the stage, n = s * b tokens, h hidden size, p per-layer hidden size, of which each of the t
tensor-parallel ranks holds q = p / t.
Sources: Gemma 3n and Gemma 4 (scaled_add); docs/design/per_layer_embedding.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region

Group = dist.ProcessGroup
_HALF = (torch.bfloat16, torch.float16)


class _NormAcrossShards(torch.autograd.Function):
    """RMSNorm over p values that are split over the ranks, q on each; all-reduces complete the sums over p."""

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
        # In place: `normed` already has the memory layout of `projected`, [n, L * q], as the result must.
        normed.mul_(mean).neg_().addcmul_(grad, scaled_weight.expand_as(grad)).mul_(inverse_rms)
        grad_projected = normed.transpose(0, 1).reshape(projected.shape).to(projected.dtype)
        return grad_projected, grad_weight, None, None, None


def project(word_embedding: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Applies the context projections of all layers in one GEMM: [s, b, h] and L weights [q, h] -> [n, L * q]."""
    tokens = word_embedding.reshape(-1, word_embedding.size(-1))
    return torch.nn.functional.linear(tokens, weights[0] if len(weights) == 1 else torch.cat(list(weights)))


def norm_across_shards(
    projected: torch.Tensor, weight: torch.Tensor, eps: float, *, scale: float, group: Group
) -> torch.Tensor:
    """Applies RMSNorm over all p values of a layer, computed in fp32, and multiplies by `scale`.

    Args:
        projected: [n, L * q].
        weight: [q], shared by all layers.
        eps: added to the mean square.
        scale: constant by which the result is multiplied.
        group: the ranks over which p is split.

    Returns:
        [L, n, q], contiguous, in the dtype of `projected`.
    """
    return _NormAcrossShards.apply(projected, weight, eps, scale, group)


def look_up(ids: torch.Tensor, tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Looks up ids in every layer's table, without scaling: integer ids [s, b], L tables [Vp, q] -> [L, n, q].

    With ids [s, b, j] the j rows of a token are summed.
    """
    if ids.dim() == 3:
        # On a CPU the backward pass of `embedding_bag` takes twice as long.
        groups = ids.flatten(0, 1)
        return torch.stack([torch.nn.functional.embedding(groups, table).sum(1) for table in tables])
    return torch.stack([torch.nn.functional.embedding(ids.reshape(-1), table) for table in tables])


def gather_parts(context: torch.Tensor, token: torch.Tensor, group: Group) -> torch.Tensor:
    """Gathers P and E, [L, n, q] on each tensor-parallel rank, to their full width p; returns both as [L, n, 2p]."""
    parts = torch.stack((context, token), dim=2)
    if group.size() > 1:
        parts = all_gather_last_dim_from_tensor_parallel_region(parts, group=group)
    return parts.flatten(2)


def multiply(parts: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiplies the values of each layer by the layer's matrix: [L, n, 2p] and L weights [q, 2p] -> [L, n, q]."""
    return torch.bmm(parts, torch.stack(list(weights)).transpose(1, 2))


def _by_layer(projected: torch.Tensor, width: int) -> torch.Tensor:
    """Reshapes [n, L * q] to [L, n, q] in at least fp32; a view if no cast is needed."""
    return _wide(projected).view(projected.size(0), -1, width).transpose(0, 1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _sum_over(tensor: torch.Tensor, group: Group) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
