"""Computes the MLP of an NPT layer with every token's weight update (delta) built as a whole matrix.

    y = W x + delta x,      delta [n, output, input]: one matrix for each of n tokens and each changed weight matrix W

Used only to measure how much memory and time the factored form of `modulation` saves, not in training. This is the
first of the two formulations in docs/design/npt_equivalence.md. It does not support tensor parallelism.
"""

import math
from typing import Any

import torch

from megatron_ext.npt.modules.modulation import LowRankModulation, Modulation, OuterProductModulation
from megatron_ext.npt.modules.npt_feed_forward import NPFeedForward


def materialised_mlp(
    feed_forward: NPFeedForward, mlp: Any, normed: torch.Tensor, attention_output: torch.Tensor
) -> torch.Tensor:
    """Computes MLP*(n) [s, b, h]; the values equal those of `NPFeedForward.modulated_mlp`.

    Args:
        feed_forward: the layer's feed-forward module, which holds the factors of the deltas.
        mlp: the base MLP.
        normed: n, the MLP's normed input, [s, b, h].
        attention_output: a, [s, b, h].
    """
    parts = feed_forward.modulations
    inner, bias = mlp.linear_fc1(normed)
    halves = list(inner.chunk(2, dim=-1)) if "fc1" not in parts else [inner]
    for index, target in enumerate(("gate", "up") if "fc1" not in parts else ("fc1",)):
        if target in parts:
            halves[index] = halves[index] + _apply(parts[target], normed, attention_output)
    inner = torch.cat(halves, dim=-1)
    activated = mlp.activation_func(inner if bias is None else inner + bias)
    output, bias = mlp.linear_fc2(activated)
    if bias is not None:
        output = output + bias
    return output + _apply(parts["down"], activated, attention_output) if "down" in parts else output


def materialised_deltas(
    modulation: Modulation, x: torch.Tensor, attention_output: torch.Tensor
) -> torch.Tensor:
    """Builds the deltas of n tokens for one weight matrix.

    Args:
        modulation: the factors of the weight matrix's deltas, in any form.
        x: input of the weight matrix, [n, input]. Only outer_product on `down` uses it, to normalise the deltas.
        attention_output: a, [n, h].

    Returns:
        [n, output, input], differentiable.
    """
    settings = modulation.settings
    if isinstance(modulation, LowRankModulation):
        reader = modulation.A_in if modulation.reads_ffn else modulation.A
        code = torch.tanh(attention_output @ modulation.A) * settings.np_scale
        return (modulation.B.t() * code.unsqueeze(1)) @ reader.t()
    assert isinstance(modulation, OuterProductModulation)
    z = modulation.code(attention_output)
    if settings.np_normalize:
        z = z * modulation.inverse_rms(z).unsqueeze(-1)
    components = (settings.num_np_components, settings.np_rank)
    v_a = torch.einsum("nkr,kri->nki", z, modulation.W_a_up.float().unflatten(0, components))
    v_a = v_a * settings.np_rank**-0.5
    if settings.has_affine:
        v_a = v_a + modulation.c_a
    if modulation.divides_by_read:
        v_a = v_a * modulation.inverse_rms(modulation.by_component(x @ modulation.W_a_up.t())).unsqueeze(-1)
    else:
        v_a = v_a * modulation.input_size**-0.5
    v_b = torch.einsum("nkr,kro->nko", z, modulation.W_b_up.float().unflatten(0, components))
    factor = settings.np_scale / math.sqrt(settings.total_rank)
    return (v_b * factor).to(x.dtype).mT @ v_a.to(x.dtype)


def _apply(modulation: Modulation, x: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
    """Returns delta x for every token: x's shape, with the output size as the last dimension."""
    rows = x.flatten(0, -2)
    deltas = materialised_deltas(modulation, rows, attention_output.flatten(0, -2))
    return torch.bmm(deltas, rows.unsqueeze(-1)).view(*x.shape[:-1], modulation.output_size)
