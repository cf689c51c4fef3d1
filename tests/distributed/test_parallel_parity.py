"""How a run is cut, and what is recomputed, changes neither its losses nor its gradients."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import (
    LAYOUTS,
    TINY,
    VOCAB_SIZE,
    WORLD_SIZES,
    TrainingTrace,
    assemble,
    train_tiny,
    with_full_recompute,
)
from megatron_ext.training.interface.family_interface import Family

STEPS = 20
BF16_STEPS = 5
RECOMPUTE = ("none", "full")
WITH_GRADIENTS = [name for name, parallel in LAYOUTS.items() if not parallel.use_distributed_optimizer]
"""Cuts that keep whole reduced gradients; the distributed optimizer keeps the part it updates."""


def per_layer_embedding() -> list[Family]:
    """PLE as document 003 has it, on a vocabulary of its own."""
    settings = PerLayerConfig(use_per_layer_embedding=True, per_layer_hidden_size=8, per_layer_vocab_size=40)
    return [PerLayerFamily(settings, VOCAB_SIZE, torch.arange(VOCAB_SIZE) * 11 % 40)]


@functools.cache
def run(
    cut: str,
    recompute: str = "none",
    make_families: Callable[[], list[Family]] = list,
    *,
    bf16: bool = False,
) -> list[TrainingTrace]:
    """Every rank's trace of a short training; each is run once for all tests."""
    steps = BF16_STEPS if bf16 else STEPS
    parallel = _with(LAYOUTS[cut], recompute)
    return run_distributed(train_tiny, WORLD_SIZES[cut], parallel, steps, make_families, TINY, bf16)


def _with(parallel: ParallelConfig, recompute: str) -> ParallelConfig:
    if recompute == "full":
        return with_full_recompute(parallel)
    if recompute == "selective":
        modules = ("core_attn", "mlp")
        return replace(parallel, recompute_granularity="selective", recompute_modules=modules)
    return parallel


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("cut", LAYOUTS)
def test_base_model_has_the_losses_of_a_single_process(cut: str, recompute: str) -> None:
    assert_same_losses(run(cut, recompute), run("TP1"))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("cut", WITH_GRADIENTS)
def test_base_model_has_the_gradients_of_a_single_process(cut: str, recompute: str) -> None:
    assert_same_gradients(run(cut, recompute), run("TP1"))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("cut", LAYOUTS)
def test_per_layer_embedding_has_the_losses_of_a_single_process(cut: str, recompute: str) -> None:
    assert_same_losses(run(cut, recompute, per_layer_embedding), run("TP1", "none", per_layer_embedding))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("cut", WITH_GRADIENTS)
def test_per_layer_embedding_has_the_gradients_of_a_single_process(cut: str, recompute: str) -> None:
    assert_same_gradients(run(cut, recompute, per_layer_embedding), run("TP1", "none", per_layer_embedding))


@pytest.mark.parametrize("cut", ["TP1", "TP2+SP", "PP2 interleaved"])
def test_selective_recompute_changes_nothing(cut: str) -> None:
    assert_same_losses(run(cut, "selective"), run("TP1"))
    assert_same_gradients(run(cut, "selective"), run("TP1"))


@pytest.mark.parametrize("make_families", [list, per_layer_embedding])
def test_as_many_micro_batches_as_stages_and_overlapped_communication_change_nothing(
    make_families: Callable[[], list[Family]],
) -> None:
    # DP2 leaves two micro-batches for two stages, where messages of two kinds between the same ranks would meet.
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=1,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    traces = run_distributed(train_tiny, 4, parallel, STEPS, make_families)
    assert_same_losses(traces, run("TP1", "none", make_families))


@pytest.mark.parametrize("cut", LAYOUTS)
def test_bf16_follows_fp32_within_its_rounding(cut: str) -> None:
    rounded, exact = run(cut, bf16=True), run("TP1")[0]
    for trace in rounded:
        # bf16 keeps 8 bits. The norms of later steps are those of other weights, and say less.
        assert trace.losses == pytest.approx(exact.losses[:BF16_STEPS], rel=5e-3)
        assert trace.grad_norms[0] == pytest.approx(exact.grad_norms[0], rel=1e-2)
        assert trace.grad_norms == pytest.approx(exact.grad_norms[:BF16_STEPS], rel=0.1)


@pytest.mark.parametrize("cut", WITH_GRADIENTS)
def test_bf16_gradients_follow_fp32_parameter_by_parameter(cut: str) -> None:
    rounded, exact = assemble(run(cut, bf16=True)), assemble(run("TP1"))
    assert rounded.keys() == exact.keys()
    for name, gradient in exact.items():
        assert torch.linalg.norm(rounded[name] - gradient) < 5e-2 * torch.linalg.norm(gradient), name


def assert_same_losses(traces: list[TrainingTrace], reference: list[TrainingTrace]) -> None:
    """Losses within 1e-6 at the first step and 1e-5 at all, gradient norms within 1e-5 and 1e-3."""
    single = reference[0]
    moved = max(single.losses) - min(single.losses)
    assert moved > 0.1, "training moves nothing: the comparison would say little"
    for trace in traces:
        assert trace.losses[0] == pytest.approx(single.losses[0], rel=1e-6)
        assert trace.losses == pytest.approx(single.losses, rel=1e-5)
        assert trace.grad_norms[0] == pytest.approx(single.grad_norms[0], rel=1e-5)
        assert trace.grad_norms == pytest.approx(single.grad_norms, rel=1e-3)


def assert_same_gradients(traces: list[TrainingTrace], reference: list[TrainingTrace]) -> None:
    """The first step's gradients, assembled from all ranks' shards, within 1e-5 of each parameter's gradient norm."""
    found, expected = assemble(traces), assemble(reference)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        norm = torch.linalg.norm(gradient)
        assert norm > 0, f"{name} gets no gradient"
        assert torch.linalg.norm(found[name] - gradient) < 1e-5 * norm, name
