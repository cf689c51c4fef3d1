"""Reference implementations for tests: unsharded tensors in float64, written directly from the formulas.

The formulas for the per-layer embedding are in `per_layer.combination`. n: tokens, h: hidden size,
p: per-layer size, Vp: per-layer vocabulary size.
"""

import math

import torch

Tensor = torch.Tensor


def reference_rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight, with the mean over the last dimension."""
    return values / torch.sqrt((values * values).mean(-1, keepdim=True) + eps) * weight


def reference_activation(values: Tensor, name: str) -> Tensor:
    """Applies the activation `name`: relu, gelu (exact), gelu_tanh, silu or swish.

    Raises:
        ValueError: the name is unknown; the formula of a new activation must be added here to test it.
    """
    if name == "relu":
        return torch.where(values > 0, values, torch.zeros_like(values))
    if name == "gelu":
        return 0.5 * values * (1 + torch.erf(values / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * values * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))
    if name in ("silu", "swish"):
        return values / (1 + torch.exp(-values))
    raise ValueError(f"activation {name}: has no reference; add its formula to reference_activation")


def reference_per_layer_vector(
    embedding: Tensor,
    ids: Tensor | None,
    table: Tensor,
    context_weight: Tensor,
    norm_weight: Tensor,
    combination_weight: Tensor | None,
    *,
    method: str,
    embed_scale: float,
    eps: float,
) -> Tensor:
    """Returns the per-layer vector `c` of one layer, [n, p].

    Args:
        embedding: word embedding, [n, h].
        ids: per-layer ids [n], or [n, j] for j rows per token; with None, c is the projected word embedding alone.
        table: the layer's per-layer embedding table, [Vp, p].
        context_weight: projection of the word embedding, [p, h].
        norm_weight: weight of the norm after the projection, [p].
        combination_weight: [p, 2p] for `concat` and `gated`, else None.
        method: `scaled_add`, `concat` or `gated`.
        embed_scale: factor by which the table's rows are multiplied, in addition to sqrt(p).
        eps: epsilon of the norm.
    """
    hidden, width = embedding.size(1), table.size(1)
    context = reference_rms_norm(embedding @ context_weight.T * hidden**-0.5, norm_weight, eps)
    if ids is None:
        return context
    rows = ids if ids.dim() == 2 else ids.unsqueeze(1)
    token = table[rows].sum(1) / math.sqrt(rows.size(1)) * math.sqrt(width) * embed_scale
    if method == "scaled_add":
        return (context + token) / math.sqrt(2)
    assert combination_weight is not None
    mixed = torch.cat([context, token], dim=1) @ combination_weight.T
    if method == "concat":
        return mixed
    gate = 1 / (1 + torch.exp(-mixed))
    return gate * token + (1 - gate) * context


def reference_per_layer_block(
    hidden_states: Tensor,
    vector: Tensor,
    gate_weight: Tensor,
    projection_weight: Tensor,
    post_norm_weight: Tensor,
    *,
    activation: str,
    eps: float,
    layer_scalar: float = 1.0,
) -> Tensor:
    """Returns the per-layer block's output [n, h] for hidden states [n, h] and vector c [n, p], without dropout."""
    activated = reference_activation(hidden_states @ gate_weight.T, activation)
    update = (activated * vector) @ projection_weight.T
    return (hidden_states + reference_rms_norm(update, post_norm_weight, eps)) * layer_scalar
