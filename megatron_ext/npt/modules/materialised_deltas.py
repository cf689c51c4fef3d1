"""Computes the MLP of an NPT layer with every token's weight update (delta) built as a whole matrix.

    y = W x + delta x,      delta [n, output, input]: one matrix for each of n tokens and each changed weight matrix W

This form is not used in training, but only to measure the memory and time that the factored form of `modulation`
saves. It is the first of the two formulations in docs/design/npt_equivalence.md. It does not support tensor
parallelism.
"""

import math
from typing import Any

import torch

from megatron_ext.models.ops.norm import full_weight
from megatron_ext.npt.modules.key_value import KeyValueModulation, norm_bias, norm_gain
from megatron_ext.npt.modules.modulation import LowRankModulation, Modulation, OuterProductModulation
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward


def materialised_mlp(
    feed_forward: NPFeedForward, layer: Any, hidden_states: torch.Tensor, attention_output: torch.Tensor
) -> torch.Tensor:
    """Computes MLP*(LN2(h)) [s, b, h]; the values equal those of `NPFeedForward.mlp_output`.

    Args:
        feed_forward: the layer's feed-forward module, which holds the factors of the deltas.
        layer: the transformer layer, whose norm and MLP are used.
        hidden_states: h, the norm's input, [s, b, h].
        attention_output: a, [s, b, h].
    """
    parts, mlp = feed_forward.modulations, layer.mlp
    normed = layer.pre_mlp_layernorm(hidden_states)
    inner, bias = mlp.linear_fc1(normed)
    targets = ("gate", "up") if "fc1" not in parts else ("fc1",)
    halves = list(inner.chunk(len(targets), dim=-1))
    inputs = [value.flatten(0, -2) for value in (normed, attention_output, hidden_states)]
    for index, target in enumerate(targets):
        if target in parts:
            deltas = materialised_deltas(parts[target], *inputs, layer=layer)
            halves[index] = halves[index] + _apply(deltas, normed)
    inner = torch.cat(halves, dim=-1)
    activated = mlp.activation_func(inner if bias is None else inner + bias)
    output, bias = mlp.linear_fc2(activated)
    if bias is not None:
        output = output + bias
    if "down" not in parts:
        return output
    deltas = materialised_deltas(parts["down"], activated.flatten(0, -2), inputs[1], inputs[2], layer=layer)
    return output + _apply(deltas, activated)


def materialised_deltas(
    modulation: Modulation,
    x: torch.Tensor,
    attention_output: torch.Tensor,
    hidden_states: torch.Tensor,
    *,
    layer: Any,
) -> torch.Tensor:
    """Builds the deltas of n tokens for one weight matrix.

    Args:
        modulation: the factors of the weight matrix's deltas, in any form.
        x: input of the weight matrix, [n, input]. Used by the form key_value, and by outer_product on `down`.
        attention_output: a, [n, h].
        hidden_states: h, [n, h]. Used by the form key_value only.
        layer: the transformer layer; the form key_value uses its norm and weights.

    Returns:
        [n, output, input], differentiable.
    """
    settings = modulation.settings
    if isinstance(modulation, LowRankModulation):
        reader = modulation.A_in if modulation.reads_ffn else modulation.A
        code = torch.tanh(attention_output @ modulation.A) * settings.np_scale
        return (modulation.B.t() * code.unsqueeze(1)) @ reader.t()
    if isinstance(modulation, KeyValueModulation):
        return _key_value_deltas(modulation, x, attention_output, hidden_states, layer)
    assert isinstance(modulation, OuterProductModulation)
    z = modulation.code(attention_output)
    if settings.np_normalize:
        z = z * modulation.inverse_rms(z).unsqueeze(-1)
    components = (settings.num_np_components, modulation.rank)
    v_a = torch.einsum("nkr,kri->nki", z, modulation.W_a_up.float().unflatten(0, components))
    v_a = v_a * modulation.rank**-0.5
    if settings.has_affine:
        v_a = v_a + modulation.c_a
    if modulation.divides_by_read:
        v_a = v_a * modulation.inverse_rms(modulation.by_component(x @ modulation.W_a_up.t())).unsqueeze(-1)
    else:
        v_a = v_a * modulation.input_size**-0.5
    v_b = torch.einsum("nkr,kro->nko", z, modulation.W_b_up.float().unflatten(0, components))
    factor = settings.np_scale / math.sqrt(modulation.total_rank)
    return (v_b * factor).to(x.dtype).mT @ v_a.to(x.dtype)


def _key_value_deltas(
    modulation: KeyValueModulation,
    x: torch.Tensor,
    attention_output: torch.Tensor,
    hidden_states: torch.Tensor,
    layer: Any,
) -> torch.Tensor:
    key = x / x.square().sum(-1, keepdim=True)
    if modulation.reads_ffn:
        return _outer(modulation.coefficients(x, attention_output) @ modulation.B, key)
    gain, inverse_rms = norm_gain(hidden_states, attention_output, modulation.settings, modulation.config)
    norm, weight = layer.pre_mlp_layernorm, layer.mlp.linear_fc1.weight
    changes, bias = (
        modulation.code(attention_output, inverse_rms) @ modulation.B * full_weight(norm),
        norm_bias(norm),
    )
    if bias is not None:
        changes = changes - (gain - 1) * bias
    return _outer(changes @ weight.t(), key) + (gain - 1).unsqueeze(-1) * weight


def _outer(values: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return values.unsqueeze(-1) * key.unsqueeze(-2)


def _apply(deltas: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns delta x; the shape is that of x except for the last dimension, which is the output size."""
    return torch.bmm(deltas, x.flatten(0, -2).unsqueeze(-1)).view(*x.shape[:-1], deltas.size(1))
