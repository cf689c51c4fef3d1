"""How a run is divided, and what is recomputed, changes neither its losses nor its gradients."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.layout_runs import (
    OVERLAPPED_CONTEXT,
    OVERLAPPED_PIPELINE,
    OVERLAPPED_STAGES,
    LayoutRuns,
    Variant,
    assert_same_run,
)
from megatron_ext.testing.tiny_training import CONTEXT_LAYOUTS, LAYOUTS, VOCAB_SIZE, assemble
from megatron_ext.training.interface.family_interface import Family


def per_layer_embedding() -> list[Family]:
    """PLE as document 003 has it, on a vocabulary of its own."""
    settings = PerLayerConfig(use_per_layer_embedding=True, per_layer_hidden_size=8, per_layer_vocab_size=40)
    return [PerLayerFamily(settings, VOCAB_SIZE, torch.arange(VOCAB_SIZE) * 11 % 40)]


BASE = Variant(steps=5, micro_batch_size=1)
PLE = replace(BASE, make_families=per_layer_embedding)
VARIANTS = {
    "base model": BASE,
    "base model, 3 steps": replace(BASE, steps=3, micro_batch_size=None),
    "PLE": PLE,
    "PLE, 3 steps": replace(PLE, steps=3, micro_batch_size=None),
}
OTHERS = [
    *(f"{layout} recomputed" for layout in LAYOUTS),
    *(OVERLAPPED_PIPELINE, OVERLAPPED_CONTEXT, OVERLAPPED_STAGES),
    *CONTEXT_LAYOUTS,
    *("CP2 recomputed", "PP2xCP2 recomputed"),
]
IN_TEST_PER_LAYER_LAYOUTS = {
    *("TP2+SP recomputed", "PP2 interleaved recomputed"),
    *("CP2", "TP2+SPxCP2", "PP2xCP2 recomputed", "DP2xCP2 distributed optimizer"),
}
"""Layouts at which PLE trains in tests/distributed/families/test_per_layer_layouts.py, as it does at all of LAYOUTS."""

RUNS = LayoutRuns(
    VARIANTS,
    [],
    {
        **{layout: ["base model"] for layout in LAYOUTS if layout != "TP1"},
        **{
            layout: ["base model, 3 steps"] + ["PLE, 3 steps"] * (layout not in IN_TEST_PER_LAYER_LAYOUTS)
            for layout in OTHERS
        },
        **{
            f"{layout} MLP recomputed": ["base model, 3 steps"]
            for layout in ("TP1", "TP2+SP", "PP2 interleaved", "CP2")
        },
    },
)
ROUNDED = (*LAYOUTS, "CP2")
BF16 = LayoutRuns({"base model": replace(BASE, steps=3, micro_batch_size=None, precision="bf16")}, ROUNDED)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_has_the_losses_and_gradients_of_a_single_process(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant), norms=1e-3)


@pytest.mark.parametrize("variant", ["base model", "PLE"])
def test_the_compared_training_moves_every_parameter(variant: str) -> None:
    trace = RUNS.single(variant).trace
    assert max(trace.losses) - min(trace.losses) > 0.1
    assert all(torch.linalg.norm(gradient) > 0 for gradient in assemble([trace]).values())


@pytest.mark.parametrize("layout", ROUNDED)
def test_bf16_follows_fp32_within_its_rounding(layout: str) -> None:
    # bf16 keeps 8 bits. The norms of later steps are those of other weights, and say less.
    rounded, exact = BF16.at(layout, "base model"), RUNS.single("base model")
    assert_same_run(rounded, exact, losses=5e-3, norms=0.1, gradients=5e-2)
    for run in rounded:
        assert run.trace.losses[0] == pytest.approx(exact.trace.losses[0], rel=5e-3)
        assert run.trace.grad_norms[0] == pytest.approx(exact.trace.grad_norms[0], rel=1e-2)
