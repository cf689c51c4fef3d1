"""Which ranks draw the same dropout masks: those that hold the same activations, and no others."""

import functools
from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize, seed_streams
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import (
    CONTEXT_LAYOUTS,
    LAYOUTS,
    TINY,
    VOCAB_SIZE,
    TrainingTrace,
    assemble,
    train_tiny,
    with_full_recompute,
)

WITH_DROPOUT = replace(TINY, hidden_dropout=0.5, attention_dropout=0.5)
PARALLEL = LAYOUTS | {name: parallel for name, (parallel, _) in CONTEXT_LAYOUTS.items()}
SHARED, OWN = "the stream of replicated activations", "the stream of split activations"


def _drawn(layout: str, reseeded: bool) -> dict[str, torch.Tensor]:
    initialize(PARALLEL[layout], seed=1)
    if reseeded:  # as a run does that goes on at another parallel layout
        seed_streams(5)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(64)
    return {SHARED: torch.rand(64), OWN: own}


@pytest.mark.parametrize("reseeded", [False, True])
@pytest.mark.parametrize(
    ("layout", "equal"),
    [
        ("TP2", {SHARED}),
        ("PP2", set[str]()),
        ("DP2", set[str]()),
        ("CP2", set[str]()),
        ("TP2xPP2", {SHARED}),
    ],
)
def test_stages_and_model_copies_draw_apart_and_tensor_parallel_ranks_share_one_stream(
    layout: str, equal: set[str], reseeded: bool
) -> None:
    ranks = run_distributed(_drawn, 4 if layout == "TP2xPP2" else 2, layout, reseeded)
    assert {name for name in (SHARED, OWN) if ranks[0][name].equal(ranks[1][name])} == equal
    everything = [rank[OWN] for rank in ranks]
    assert len({tuple(values.tolist()) for values in everything}) == len(ranks)


def _dropped_embedding(layout: str) -> torch.Tensor:
    """Where the embedding's dropout has put zeros: [s, b, h] ([s/t, b, h] under sequence parallel)."""
    initialize(LAYOUTS[layout], seed=1)
    chunk = build_model(WITH_DROPOUT, LAYOUTS[layout], vocab_size=VOCAB_SIZE, seed=1)[0].train()
    tokens = torch.arange(TINY.seq_length).unsqueeze(0)
    return chunk.embedding(input_ids=tokens, position_ids=tokens).detach() == 0


@pytest.mark.parametrize(("layout", "same"), [("TP2", True), ("TP2+SP", False), ("DP2", False)])
def test_masks_agree_where_activations_are_replicated_and_differ_elsewhere(layout: str, same: bool) -> None:
    first, second = run_distributed(_dropped_embedding, 2, layout)
    assert 0.3 < first.float().mean() < 0.7
    assert first.equal(second) == same


@functools.cache
def _trained(layout: str, recompute: bool) -> list[TrainingTrace]:
    parallel = with_full_recompute(PARALLEL[layout]) if recompute else PARALLEL[layout]
    return run_distributed(train_tiny, 1 if layout == "TP1" else 2, parallel, 2, list, WITH_DROPOUT)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2 interleaved", "CP2"])
def test_recomputed_layers_draw_the_masks_of_their_forward_pass(layout: str) -> None:
    kept, recomputed = _trained(layout, False), _trained(layout, True)
    assert recomputed[0].losses == pytest.approx(kept[0].losses, rel=1e-6)
    gradients, expected = assemble(recomputed), assemble(kept)
    for name, gradient in expected.items():
        assert torch.linalg.norm(gradients[name] - gradient) <= 1e-6 * torch.linalg.norm(gradient), name
