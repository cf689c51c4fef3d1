"""Settings that Megatron-LM users bring, in all three families and at every kind of layout, against one process."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.layout_runs import LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.tiny_training import CONSTANT, TINY, VOCAB_SIZE
from megatron_ext.training.interface.family_interface import Family
from tests.unit.progressive.progressive_helpers import DUAL, MakeAdapted

LAYOUTS = ("TP2+SP", "PP2 interleaved", "DP2 distributed optimizer")
NP = NPTModuleConfig(
    npt_layers="all",
    np_form="low_rank",
    np_rank=8,
    np_residual="keep",
    np_init_scale=0.5,  # with a smaller one, gradients are too small for fp16 without a large loss scale
    freeze_base=False,
)


def per_layer() -> list[Family]:
    """PLE, with the statistics of its gradients."""
    settings = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_hidden_size=8,
        per_layer_vocab_size=24,
        log_per_layer_gradients=True,
        per_layer_stats_interval=1,
    )
    return [PerLayerFamily(settings, VOCAB_SIZE, [token % 24 for token in range(VOCAB_SIZE)])]


def npt() -> list[Family]:
    """NPT's layers, whose losses are attached to them, on a base that trains too."""
    return [NPTFamily(NP)]


def npt_without_gate() -> list[Family]:
    """NPT's layers on an MLP that has no gate."""
    return [NPTFamily(replace(NP, np_target="fc1"))]


adapted = MakeAdapted(dict.fromkeys(range(TINY.num_layers), replace(DUAL, trains_base=True)))
"""A rack of adapted layers, as progressive growth has them."""

FAMILIES: dict[str, Callable[[], list[Family]]] = {"PLE": per_layer, "NPT": npt, "adapters": adapted}
EXACT = {name: Variant(make_families=make) for name, make in FAMILIES.items()}
FP16 = {f"{name}, fp16": replace(variant, precision="fp16", steps=5) for name, variant in EXACT.items()}
RELU = {
    f"{name}, squared ReLU, decoupled rates": Variant(
        make_families=make,
        model=replace(TINY, swiglu=False, squared_relu=True),
        settings=replace(CONSTANT, decoupled_lr=2e-2),
        steps=3,
    )
    for name, make in {**FAMILIES, "NPT": npt_without_gate}.items()
}
SUMS = {
    **{
        f"{name}, bf16, sums in bf16": replace(
            variant, precision="bf16", parallel={"grad_reduce_in_bf16": True}
        )
        for name, variant in EXACT.items()
    },
    "PLE, fp16, sums in fp32": replace(
        FP16["PLE, fp16"], parallel={"accumulate_allreduce_grads_in_fp32": True}
    ),
}
"""Gradients are summed over micro-batches and ranks in another precision than is the default."""

RUNS = LayoutRuns(
    {**EXACT, **FP16, **RELU, **SUMS}, (), {layout: [*FP16, *RELU, *SUMS] for layout in LAYOUTS}
)


@pytest.mark.parametrize("variant", RELU)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squared_relu_and_decoupled_rates_train_at_every_layout_as_in_a_single_process(
    layout: str, variant: str
) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant), norms=1e-3)


@pytest.mark.parametrize("variant", FP16)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp16_follows_fp32_and_the_single_process_within_its_rounding(layout: str, variant: str) -> None:
    # fp16 keeps 11 bits. The scale doubles every second step, and with it nothing else changes.
    runs, exact = RUNS.at(layout, variant), RUNS.single(variant.removesuffix(", fp16"))
    assert_same_run(runs, RUNS.single(variant), losses=1e-3, norms=1e-2, gradients=1e-2, statistics=2e-2)
    assert runs[0].trace.losses[:2] == pytest.approx(exact.trace.losses, rel=1e-3)
    assert runs[0].trace.grad_norms[0] == pytest.approx(exact.trace.grad_norms[0], rel=5e-3)
    assert runs[0].trace.layer_losses[0] == pytest.approx(exact.trace.layer_losses[0], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("variant", SUMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_summed_in_another_precision_are_those_of_fp32_within_its_rounding(
    layout: str, variant: str
) -> None:
    found, exact = RUNS.at(layout, variant)[0].trace, RUNS.single(variant.partition(",")[0]).trace
    assert found.losses[:2] == pytest.approx(exact.losses, rel=1e-2)
    assert found.grad_norms[0] == pytest.approx(exact.grad_norms[0], rel=1e-2)
