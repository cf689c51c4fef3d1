"""Sizes of v_a, v_b and deltas from r-sized quantities: against the vectors and deltas themselves, in float64."""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.modules.key_value import norm_bias
from megatron_ext.npt.modules.npt_extension import NPTExtension
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.modules.vector_norms import GeneratedVectors, delta_norms, factor_norm, weight_norm
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.npt_references import reference_delta, reference_key_value_deltas
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single

Tensor = torch.Tensor

HIDDEN, FFN, SEQUENCE, BATCH = 16, 24, 4, 2
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=HIDDEN,
    ffn_hidden_size=FFN,
    num_attention_heads=2,
    seq_length=SEQUENCE,
    swiglu=True,
    disable_bias_linear=True,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
LAYER_NORM = replace(MODEL, normalization="LayerNorm")
LOW_RANK = NPTModuleConfig(
    npt_layers="all", np_rank=3, np_target="gate+up+down", np_scale=0.7, np_init_scale=0.5
)
OUTER = replace(LOW_RANK, np_form="outer_product")
FORMS = {
    f"{name} k={k}": replace(settings, num_np_components=k)
    for name, settings in {
        "low_rank": LOW_RANK,
        "outer": OUTER,
        "outer without affine": replace(OUTER, np_affine=False),
        "outer bare": replace(OUTER, np_normalize=False),
    }.items()
    for k in (1, 3)
} | {name: replace(LOW_RANK, np_form="key_value") for name in ("key_value", "key_value after LayerNorm")}
TP2 = ParallelConfig(tensor_model_parallel_size=2)
LAYOUTS = {"TP1": ParallelConfig(), "TP2": TP2, "TP2+SP": replace(TP2, sequence_parallel=True)}
VECTORS = ("reconstruction_error", "attention_square", "similarity", "a_square", "b_square")
NORMS = ("a_norm", "b_norm")


def _layer(settings: NPTModuleConfig, parallel: ParallelConfig, model: ModelConfig = MODEL) -> Any:
    chunks = build_model(model, parallel, vocab_size=32, seed=3, extensions=[NPTExtension(settings)])
    layer: Any = chunks[0].decoder.layers[0]
    with torch.no_grad():
        for parameter in layer.pre_mlp_layernorm.parameters():
            parameter.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(8))
        for name, parameter in layer.feed_forward.named_parameters():
            if name.endswith("c_a"):  # zeros so far
                part = layer.feed_forward.get_submodule(name.split(".")[0])
                whole = torch.randn(
                    len(parameter), part.input_size, generator=torch.Generator().manual_seed(9)
                )
                parameter.copy_(_local(whole, part.split_dims.get("c_a")))
    return layer


def _local(whole: Tensor, dim: int | None) -> Tensor:
    if dim is None:
        return whole
    size, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return whole.chunk(size, dim)[rank]


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """a [s, b, h], whose tokens are of very different sizes, the input of `down` [s, b, f], whole, and h [s, b, h]."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)
    sizes = torch.exp(torch.randn(SEQUENCE, BATCH, 1, generator=generator))
    x = torch.randn(SEQUENCE, BATCH, FFN, generator=generator)
    return a * sizes, x, torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)


def _measure(layout: str) -> dict[str, dict[str, Any]]:
    initialize(LAYOUTS[layout], seed=3)
    return {
        name: _measured(settings, LAYOUTS[layout], LAYER_NORM if "LayerNorm" in name else MODEL)
        for name, settings in FORMS.items()
    }


def _measured(settings: NPTModuleConfig, parallel: ParallelConfig, model: ModelConfig) -> dict[str, Any]:
    """All quantities of all targets, gradients of a loss over them, and the factors; this rank's parts."""
    layer = _layer(settings, parallel, model)
    sp = parallel.sequence_parallel
    whole_a, whole_x, whole_h = _inputs()
    a = _local(whole_a, 0 if sp else None).clone().requires_grad_()
    hidden = _local(whole_h, 0 if sp else None)
    x = _local(whole_x, 2)
    values: dict[str, Tensor] = {}
    loss = torch.zeros(())
    for target, part in layer.feed_forward.modulations.items():
        values[f"{target}.delta_norms"] = delta_norms(part, a, x, layer, hidden)
        values[f"{target}.weight_norm"] = weight_norm(part, layer.mlp)
        found = {"factor_norm": factor_norm(part)}
        if settings.np_form == "outer_product" and target != "down":
            vectors = GeneratedVectors(part, a)
            found |= {name: getattr(vectors, name)() for name in VECTORS}
            values |= {f"{target}.{name}": getattr(vectors, name)() for name in NORMS}
        for number, (name, value) in enumerate(found.items()):
            values[f"{target}.{name}"] = value.detach()
            loss = loss + (number + 1) * value.mean()
    (loss / (2 if sp else 1)).backward()
    gradients: dict[str, Tensor] = {}
    for name, parameter in layer.feed_forward.named_parameters():
        assert parameter.grad is not None
        if getattr(parameter, "sequence_parallel", False):  # as the engine does after the backward pass
            torch.distributed.all_reduce(
                parameter.grad, group=parallel_state.get_tensor_model_parallel_group()
            )
        gradients[name] = parameter.grad
    assert settings.np_form != "outer_product" or a.grad is not None
    factors = {
        target: {name: value.detach() for name, value in part.named_parameters()}
        for target, part in layer.feed_forward.modulations.items()
    }
    weights = {"fc1": layer.mlp.linear_fc1.weight.detach(), "fc2": layer.mlp.linear_fc2.weight.detach()}
    norm = layer.pre_mlp_layernorm
    weights["norm"] = norm.weight.detach()
    if norm_bias(norm) is not None:
        weights["norm_bias"] = norm.bias.detach()
    return {"values": values, "gradients": gradients, "a": a.grad, "factors": factors, "weights": weights}


@functools.cache
def measured(layout: str) -> list[dict[str, dict[str, Any]]]:
    """By rank and form."""
    return run_distributed(_measure, LAYOUTS[layout].tensor_model_parallel_size, layout)


@functools.cache
def expected(form: str) -> dict[str, Any]:
    """The same quantities from the vectors and deltas, in float64."""
    settings, found = FORMS[form], measured("TP1")[0][form]
    a, x, hidden = (value.double().flatten(0, 1) for value in _inputs())
    a.requires_grad_()
    factors = {
        target: {name: value.double().requires_grad_() for name, value in of_target.items()}
        for target, of_target in found["factors"].items()
    }
    values: dict[str, Tensor] = {}
    loss: Any = 0
    for target, of_target in factors.items():
        with torch.no_grad():
            if settings.np_form == "key_value" and target != "down":
                base = {name: weight.double() for name, weight in found["weights"].items()}
                of_fc1 = reference_key_value_deltas(settings, base, factors, hidden, a, MODEL.norm_epsilon)
                deltas = of_fc1[target]
            else:
                deltas = reference_delta(
                    settings, of_target, a, x if target == "down" else a, target == "down"
                )
        values[f"{target}.delta_norms"] = deltas.flatten(1).norm(dim=1).view(SEQUENCE, BATCH)
        values[f"{target}.weight_norm"] = _weight(found["weights"], target).double().norm()
        quantities = {"factor_norm": torch.stack([factor.norm() for factor in of_target.values()]).sum()}
        if settings.np_form == "outer_product" and target != "down":
            quantities |= _vectors(settings, of_target, a)
        values |= {f"{target}.{name}": value for name, value in quantities.items()}
        trained = [value for name, value in quantities.items() if name not in NORMS]
        loss = loss + sum((number + 1) * value.mean() for number, value in enumerate(trained))
    loss.backward()
    gradients = {
        f"{target}.{name}": value.grad
        for target, of_target in factors.items()
        for name, value in of_target.items()
    }
    return {"values": values, "gradients": gradients, "a": a.grad}


def _weight(weights: dict[str, Tensor], target: str) -> Tensor:
    gate, up = weights["fc1"].chunk(2)
    return {"gate": gate, "up": up, "fc1": weights["fc1"], "down": weights["fc2"]}[target]


def _vectors(settings: NPTModuleConfig, factors: dict[str, Tensor], a: Tensor) -> dict[str, Tensor]:
    all_a, all_b, rank = [], [], int(settings.np_rank)
    for component in range(settings.num_np_components):
        columns = slice(component * rank, (component + 1) * rank)
        z = a @ factors["W_down"][:, columns]
        v_a = z @ factors["W_a_up"][columns] / math.sqrt(rank)
        all_a.append(v_a + factors["c_a"][component] if settings.np_affine else v_a)
        all_b.append(z @ factors["W_b_up"][columns])
    v_a, v_b, target = torch.stack(all_a), torch.stack(all_b), a.expand(len(all_a), *a.shape)
    return {
        "reconstruction_error": (v_a - target).square().view(len(v_a), SEQUENCE, BATCH, -1).mean((0, 1, 3)),
        "attention_square": a.square().view(SEQUENCE, BATCH, -1).mean((0, 2)),
        "similarity": torch.nn.functional.cosine_similarity(v_a, target, dim=-1).mean(),
        "a_square": v_a.square().mean(),
        "b_square": v_b.square().mean(),
        "a_norm": v_a.norm(dim=-1).mean(),
        "b_norm": v_b.norm(dim=-1).mean(),
    }


def _close(found: Tensor, right: Tensor, name: str) -> None:
    right = right.detach()
    assert torch.linalg.norm(right) > 0, f"{name}: nothing is compared with zero"
    difference = torch.linalg.norm(found.double().view_as(right) - right)
    assert difference < 3e-6 * torch.linalg.norm(right), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_quantity_and_gradient_is_that_of_the_vectors_and_deltas_themselves(
    layout: str, form: str
) -> None:
    right, ranks = expected(form), [of_rank[form] for of_rank in measured(layout)]
    split = LAYOUTS[layout].sequence_parallel
    for name, value in right["values"].items():
        parts = [rank["values"][name] for rank in ranks]
        per_token, over_tokens = name.endswith("delta_norms"), name.split(".")[1] in (*VECTORS, *NORMS)
        if split and (per_token or over_tokens):
            _close(torch.cat(parts) if per_token else sum(parts) / len(parts), value, name)
        else:
            for part in parts:
                _close(part, value, name)
    for name, gradient in right["gradients"].items():
        parts = [rank["gradients"][name] for rank in ranks]
        if parts[0].shape != gradient.shape:
            dim = int(parts[0].size(0) == gradient.size(0))
            _close(torch.cat(parts, dim), gradient, name)
        else:
            for part in parts:
                _close(part, gradient, name)
    if right["a"] is not None:
        for index, rank in enumerate(ranks):
            expected_a = right["a"].view(SEQUENCE, BATCH, HIDDEN)
            _close(rank["a"], expected_a.chunk(len(ranks))[index] if split else expected_a, "a")


def _zeros() -> dict[str, Tensor]:
    """Gradients of all quantities where a, c_a and the output factors are zero."""
    initialize(ParallelConfig(), seed=3)
    settings = replace(OUTER, np_init_strategy="conservative")
    part = _layer(settings, ParallelConfig()).feed_forward.gate
    with torch.no_grad():
        part.c_a.zero_()
    vectors = GeneratedVectors(part, torch.zeros(SEQUENCE, BATCH, HIDDEN))
    quantities = [getattr(vectors, name)() for name in VECTORS]
    torch.stack([*(value.sum() for value in quantities), factor_norm(part)]).sum().backward()
    return {name: value.grad for name, value in part.named_parameters()}


def test_zeros_have_finite_gradients() -> None:
    for name, gradient in run_single(_zeros).items():
        assert torch.isfinite(gradient).all(), name


def _refusals() -> None:
    initialize(ParallelConfig(), seed=3)
    a, _, _ = _inputs()
    for settings, target in ((LOW_RANK, "gate"), (OUTER, "down")):
        part = _layer(settings, ParallelConfig()).feed_forward.get_submodule(target)
        with pytest.raises(ValueError, match="only for --np-form outer_product and the targets"):
            GeneratedVectors(part, a)
    down = _layer(OUTER, ParallelConfig()).feed_forward.down
    with pytest.raises(ValueError, match="pass x, because the delta"):
        delta_norms(down, a)
    down = _layer(FORMS["key_value"], ParallelConfig()).feed_forward.down
    with pytest.raises(ValueError, match="pass x, because the delta"):
        delta_norms(down, a)


def test_what_is_not_defined_is_refused() -> None:
    run_single(_refusals)
