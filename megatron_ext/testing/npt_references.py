"""Reference implementation of an NPT layer's MLP for tests: computes each token's weights in float64.

It uses the formulas in `npt.modules.modulation`, written with one matrix per token and a loop over components, which is
slow but easy to check. n: tokens, h: hidden size, f: FFN size, r: rank, k: components. Weights are [output, input], as
in megatron-core. A target is a weight matrix of the MLP that NPT modulates: gate, up, fc1 or down.
"""

import math

import torch

from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.testing.references import reference_activation, reference_rms_norm

Tensor = torch.Tensor
Factors = dict[str, Tensor]
"""Maps the name of each factor of one target to its tensor, with all components side by side."""


def reference_delta(settings: NPTModuleConfig, factors: Factors, a: Tensor, x: Tensor, down: bool) -> Tensor:
    """Returns the weight deltas of one target for every token, [n, output, input].

    Args:
        settings: NPT's configuration.
        factors: factors of the target by name.
        a: attention output, [n, h].
        x: input of the target, [n, input]; used only by key_value, and by outer_product for `down`.
        down: whether the target is `down`.
    """
    rank = int(settings.np_rank)
    total: Tensor | None = None
    for k in range(settings.num_np_components):
        columns = slice(k * rank, (k + 1) * rank)
        if settings.np_form == "key_value":
            assert down, "the other targets need the base layer; see reference_key_value_deltas"
            delta = torch.einsum(
                "no,ni->noi",
                a @ factors["A"] @ factors["B"] * settings.np_scale,
                x / (x**2).sum(1, keepdim=True),
            )
        elif settings.np_form == "low_rank":
            code = torch.tanh(a @ factors["A"][:, columns])
            reader = factors["A_in" if down else "A"][:, columns]
            writer = factors["B"][columns]
            delta = torch.stack([writer.T @ torch.diag(row) @ reader.T for row in code]) * settings.np_scale
        else:
            v_a, v_b = reference_vectors(settings, factors, a, x, down, k)
            total_rank = rank * settings.num_np_components
            delta = torch.einsum("no,ni->noi", v_b, v_a) * settings.np_scale / math.sqrt(total_rank)
        total = delta if total is None else total + delta
    assert total is not None
    return total


def reference_norm(values: Tensor, base: Factors, eps: float) -> Tensor:
    """Applies LayerNorm if the base layer has a `norm_bias`, else RMSNorm; [n, h]."""
    if "norm_bias" not in base:
        return reference_rms_norm(values, base["norm"], eps)
    centred = values - values.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * base["norm"] + base["norm_bias"]


def reference_key_value_deltas(
    settings: NPTModuleConfig,
    base: Factors,
    factors: dict[str, Factors],
    hidden: Tensor,
    a: Tensor,
    eps: float,
) -> dict[str, Tensor]:
    """Returns the deltas of fc1 [n, output, h] for the form key_value; if fc1 is gated, also those of its two halves.

    The arguments are those of `reference_feed_forward`.
    """
    if "norm_bias" in base:
        bias = base["norm_bias"]
        centred_h, centred_a = (value - value.mean(-1, keepdim=True) for value in (hidden, a))
    else:
        bias, centred_h, centred_a = torch.zeros_like(base["norm"]), hidden, a
    rms_h = torch.sqrt((centred_h**2).mean(-1, keepdim=True) + eps)
    rms_m = torch.sqrt(((centred_h + centred_a) ** 2).mean(-1, keepdim=True) + eps)
    change = settings.np_scale * (rms_h / rms_m - 1)
    normed = reference_norm(hidden, base, eps)
    key = normed / (normed**2).sum(-1, keepdim=True)
    u = centred_a / rms_m @ factors["fc1"]["A"] @ factors["fc1"]["B"] * settings.np_scale
    values = (base["norm"] * u - change * bias) @ base["fc1"].T
    delta = torch.einsum("no,ni->noi", values, key) + change.unsqueeze(-1) * base["fc1"]
    halves = dict(zip(("gate", "up"), delta.chunk(2, dim=1), strict=True)) if settings.is_gated else {}
    return {"fc1": delta, **halves}


def reference_vectors(
    settings: NPTModuleConfig, factors: Factors, a: Tensor, x: Tensor, down: bool, component: int
) -> tuple[Tensor, Tensor]:
    """Returns the vectors v_a [n, input] and v_b [n, output] for one component of the form outer_product."""
    rank = int(settings.np_rank)
    columns = slice(component * rank, (component + 1) * rank)
    z = a @ factors["W_down"][:, columns]
    if settings.np_normalize:
        z = z / torch.sqrt((z * z).mean(1, keepdim=True) + 1e-6)
    reader = factors["W_a_up"][columns]
    v_a = z @ reader / math.sqrt(rank)
    if settings.np_affine:
        v_a = v_a + factors["c_a"][component]
    if down and settings.np_normalize:
        v_a = v_a / torch.sqrt(((x @ reader.T) ** 2).mean(1, keepdim=True) + 1e-6)
    else:
        v_a = v_a / math.sqrt(reader.size(1))
    return v_a, z @ factors["W_b_up"][columns]


def reference_feed_forward(
    settings: NPTModuleConfig,
    base: Factors,
    factors: dict[str, Factors],
    hidden: Tensor,
    a: Tensor,
    eps: float,
) -> Tensor:
    """Returns the output of the layer, [n, h], without dropout.

    Args:
        settings: NPT's configuration.
        base: weights of the base layer: `norm` [h], for LayerNorm `norm_bias` [h], `fc1` [2 f or f, h], `fc1_bias`,
            `fc2` [h, f], `fc2_bias`.
        factors: factors by target and name.
        hidden: input of the layer, [n, h].
        a: attention output, [n, h].
        eps: epsilon of the norm.
    """
    normed = reference_norm(hidden, base, eps)
    if settings.np_form == "key_value":
        deltas = reference_key_value_deltas(settings, base, factors, hidden, a, eps)
    else:
        deltas = {
            target: reference_delta(settings, factors[target], a, normed, False)
            for target in settings.targets
            if target != "down"
        }
    if not settings.is_gated:
        weights = base["fc1"] + deltas["fc1"]
        inner = torch.einsum("noi,ni->no", weights, normed) + base["fc1_bias"]
        activated = reference_activation(inner, "gelu")
    else:
        gate, up = base["fc1"].chunk(2)
        gate_bias, up_bias = base["fc1_bias"].chunk(2)
        gate_pre = torch.einsum("noi,ni->no", gate + deltas["gate"], normed) + gate_bias
        up_weights = up + deltas["up"] if "up" in deltas else up.expand(len(a), *up.shape)
        up_pre = torch.einsum("noi,ni->no", up_weights, normed) + up_bias
        activated = reference_activation(gate_pre, "silu") * up_pre
    output = base["fc2"]
    if "down" in settings.targets:
        output = output + reference_delta(settings, factors["down"], a, activated, True)
    else:
        output = output.expand(len(a), *output.shape)
    mlp = torch.einsum("noi,ni->no", output, activated) + base["fc2_bias"]
    return hidden + mlp + (a if settings.np_residual == "keep" else 0)
