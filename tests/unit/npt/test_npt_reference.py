"""The factored feed-forward against one that builds every token's weights, in float64: output and all gradients."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.npt_references import reference_feed_forward
from megatron_ext.testing.run_single import run_single

SEQUENCE, BATCH = 3, 2
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    seq_length=8,
    swiglu=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    init_method_std=0.3,
)
"""With biases on the linear layers."""


def _forms() -> dict[str, NPTModuleConfig]:
    low_rank = NPTModuleConfig(npt_layers="all", np_rank=4, np_scale=0.7, np_init_scale=0.5)
    outer = replace(low_rank, np_form="outer_product")
    return {
        "low_rank": low_rank,
        "outer": outer,
        "outer without affine": replace(outer, np_affine=False),
        "outer bare": replace(outer, np_normalize=False),
        "key_value": replace(low_rank, np_form="key_value", np_target="gate+up"),
        "key_value after LayerNorm": replace(low_rank, np_form="key_value", np_target="gate+up"),
    }


def _cases() -> dict[str, NPTModuleConfig]:
    return {
        f"{name} {target} k={k} {residual}": replace(
            settings, np_target=target, num_np_components=k, np_residual=residual
        )
        for name, settings in _forms().items()
        for target in ("gate", "gate+up", "gate+up+down", "fc1")
        if (settings.np_form, target) != ("key_value", "gate")
        for k in ((1, 3) if settings.np_form != "key_value" else (1,))
        for residual in ("keep", "drop")
    }


CASES = _cases()


def _worst_errors(cases: dict[str, NPTModuleConfig]) -> dict[str, dict[str, float]]:
    initialize(ParallelConfig(), seed=3)
    return {name: _errors(settings, "LayerNorm" in name) for name, settings in cases.items()}


def _errors(settings: NPTModuleConfig, layer_norm: bool) -> dict[str, float]:
    """Relative errors of the output and of every gradient."""
    norm: Any = "LayerNorm" if layer_norm else "RMSNorm"
    model = replace(MODEL, swiglu=settings.is_gated, normalization=norm)
    chunk = build_model(model, ParallelConfig(), vocab_size=32, seed=3, extensions=[NPTExtension(settings)])[
        0
    ]
    layer: Any = chunk.decoder.layers[0]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in [*layer.mlp.parameters(), *layer.pre_mlp_layernorm.parameters()]:
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3, generator=generator)
        for name, parameter in layer.feed_forward.named_parameters():
            if name.endswith("c_a"):
                parameter.normal_(0.0, 1.0, generator=generator)
    inputs = [torch.randn(SEQUENCE, BATCH, 16, generator=generator).requires_grad_() for _ in range(2)]
    weight = torch.randn(SEQUENCE, BATCH, 16, generator=generator)
    output = layer.feed_forward(layer, inputs[0], lambda _: inputs[1], None)
    (output * weight).sum().backward()

    base = {
        "norm": layer.pre_mlp_layernorm.weight,
        "fc1": layer.mlp.linear_fc1.weight,
        "fc1_bias": layer.mlp.linear_fc1.bias,
        "fc2": layer.mlp.linear_fc2.weight,
        "fc2_bias": layer.mlp.linear_fc2.bias,
    }
    if layer_norm:
        base["norm_bias"] = layer.pre_mlp_layernorm.bias
    doubles = {name: value.detach().double().requires_grad_() for name, value in base.items()}
    factors = {
        target: {name: value.detach().double().requires_grad_() for name, value in part.named_parameters()}
        for target, part in layer.feed_forward.modulations.items()
    }
    hidden, a = (value.detach().double().view(-1, 16).requires_grad_() for value in inputs)
    expected = reference_feed_forward(settings, doubles, factors, hidden, a, model.norm_epsilon)
    (expected * weight.double().view(-1, 16)).sum().backward()

    pairs = {
        "output": (output, expected),
        "hidden": (inputs[0].grad, hidden.grad),
        "a": (inputs[1].grad, a.grad),
    }
    pairs |= {name: (value.grad, doubles[name].grad) for name, value in base.items()}
    for target, part in layer.feed_forward.modulations.items():
        for name, value in part.named_parameters():
            pairs[f"{target}.{name}"] = (value.grad, factors[target][name].grad)
    return {name: _relative(found, right) for name, (found, right) in pairs.items()}


def _relative(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert found is not None and expected is not None
    expected = expected.detach()
    norm = torch.linalg.norm(expected)
    assert norm > 0, "nothing is compared with zero"
    return float(torch.linalg.norm(found.detach().double().view_as(expected) - expected) / norm)


@functools.cache
def _all_errors() -> dict[str, dict[str, float]]:
    return run_single(_worst_errors, CASES)


@pytest.mark.parametrize("case", CASES)
def test_factored_equals_materialised_in_output_and_every_gradient(case: str) -> None:
    errors = _all_errors()[case]
    per_target = {"low_rank": 2, "outer": 4, "outer bare": 4, "outer without affine": 3}
    settings = CASES[case]
    factors = per_target.get(case.split(f" {settings.np_target}")[0], 2) * len(settings.targets)
    factors += settings.np_form == "low_rank" and "down" in settings.targets
    assert len(errors) == 8 + factors + ("LayerNorm" in case)
    for name, error in errors.items():
        assert error < 2e-5, name
