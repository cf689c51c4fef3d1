"""Adapted layers at every parallel layout: losses, gradients and what is saved, against the single process."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.testing.layout_runs import LayoutRuns, SavedTensors, Variant, assert_same_run, saved_tensors
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, assemble
from tests.unit.progressive.progressive_helpers import DUAL, MODEL, MakeAdapted, build

FROZEN = replace(DUAL, trained_adapters=frozenset())
TRAINED = replace(DUAL, trains_base=True)
PLANS = {
    "adapters": dict.fromkeys(range(4), DUAL),
    "trunk frozen, base and adapters above": {0: FROZEN, 1: FROZEN, 2: TRAINED, 3: TRAINED},
    "bfloat16 below half": {
        0: replace(DUAL, precision="bfloat16"),
        1: replace(DUAL, precision="bfloat16"),
        2: replace(TRAINED, precision="half"),
        3: replace(DUAL, precision="half"),
    },
}
PLANS_OF = {
    "DP2": ["adapters"],
    "DP2 distributed optimizer": ["trunk frozen, base and adapters above"],
    "TP2xPP2": ["trunk frozen, base and adapters above"],
    "CP2": ["adapters", "trunk frozen, base and adapters above"],
    "PP2xCP2": ["trunk frozen, base and adapters above"],
    "TP2+SPxCP2": ["adapters"],
    "TP2+SP recomputed": ["adapters"],
    "TP2+SP MLP recomputed": ["adapters"],
}
"""Layouts that try some plans only; the others try all."""

# The sums of products that round are compared over micro-batches of the same size.
SIZES = {name: 1 if "half" in name else None for name in PLANS}
RUNS = LayoutRuns(
    {
        name: Variant(make_families=MakeAdapted(plan), model=MODEL, micro_batch_size=SIZES[name])
        for name, plan in PLANS.items()
    },
    LAYOUTS,
    PLANS_OF,
)


@pytest.mark.parametrize(("layout", "plan"), RUNS.cases())
def test_every_layout_trains_and_saves_as_the_single_process_does(layout: str, plan: str) -> None:
    # Products in half precision are rounded to 11 or 8 bits, and those of parts differently.
    rounded = {"losses": 1e-2, "norms": 2e-2, "gradients": 5e-2} if "half" in plan else {}
    assert_same_run(RUNS.at(layout, plan), RUNS.single(plan), **rounded)


def _layer_keys(layers: range, names: set[str]) -> set[str]:
    return {f"decoder.layers.{layer}.{name}" for layer in layers for name in names}


LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
ADAPTER_NAMES = {
    f"{linear}.{ADAPTERS}.{adapter}.{factor}"
    for linear in LINEARS
    for adapter in DUAL.adapters
    for factor in "AB"
}
BASE_NAMES = {f"{linear}.weight" for linear in LINEARS} | {
    "input_layernorm.weight",
    "pre_mlp_layernorm.weight",
}
OTHERS = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}


def test_what_the_plan_trains_has_gradients_and_nothing_else() -> None:
    found = {plan: assemble([RUNS.single(plan).trace]) for plan in PLANS}
    everywhere = _layer_keys(range(4), ADAPTER_NAMES) | OTHERS
    assert found["adapters"].keys() == everywhere
    above = _layer_keys(range(2, 4), ADAPTER_NAMES | BASE_NAMES) | OTHERS
    assert found["trunk frozen, base and adapters above"].keys() == above
    mixed = everywhere | _layer_keys(range(2, 3), BASE_NAMES)
    assert found["bfloat16 below half"].keys() == mixed
    for gradients in found.values():
        assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


def test_precision_does_not_change_the_gradients_much() -> None:
    exact, mixed = (assemble([RUNS.single(plan).trace]) for plan in ("adapters", "bfloat16 below half"))
    for key, gradient in exact.items():
        assert torch.linalg.norm(mixed[key] - gradient) < 5e-2 * torch.linalg.norm(gradient), key


def test_the_base_keeps_its_names_and_shapes_in_a_checkpoint() -> None:
    plain = run_single(_saved_plain)
    saved = RUNS.single("adapters").saved
    assert {(key, shape) for key, shape in saved if ADAPTERS not in key} == plain
    assert {key for key, _ in saved if ADAPTERS in key} == _layer_keys(range(4), ADAPTER_NAMES)
    shapes = dict(saved)
    h, f, qkv = MODEL.hidden_size, MODEL.resolved_ffn_hidden_size, 2 * MODEL.hidden_size
    sizes = {"linear_qkv": (h, qkv), "linear_proj": (h, h), "linear_fc1": (h, 2 * f), "linear_fc2": (f, h)}
    for linear in LINEARS:
        inputs, outputs = sizes[linear.split(".")[1]]
        for name, shape in DUAL.adapters.items():
            prefix = f"decoder.layers.1.{linear}.{ADAPTERS}.{name}"
            assert shapes[f"{prefix}.A"] == (shape.rank, inputs)
            assert shapes[f"{prefix}.B"] == (outputs, shape.rank)


def _saved_plain() -> SavedTensors:
    return saved_tensors(build({}))
