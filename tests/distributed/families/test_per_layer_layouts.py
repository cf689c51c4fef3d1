"""The same run at every parallel layout: losses, gradient norms, first gradients of all parameters, statistics,
checkpoint keys.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.initialization import CHECKPOINT_METADATA
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

STEPS = 2
RECOMPUTED = " recomputed"
OVERLAPPED = "DP2 overlapped distributed optimizer"
EVERY_LAYOUT = {
    **LAYOUTS,
    OVERLAPPED: ParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
}
CASES = [*EVERY_LAYOUT, f"TP2+SP{RECOMPUTED}", f"PP2 interleaved{RECOMPUTED}"]
ROWS = 24
TABLE = [token % ROWS for token in range(VOCAB_SIZE)]
DOCUMENT_003 = PerLayerConfig(
    use_per_layer_embedding=True,
    per_layer_vocab_size=ROWS,
    per_layer_hidden_size=8,
    log_per_layer_stats=True,
    log_per_layer_gradients=True,
    per_layer_stats_interval=1,
)
VARIANTS = {
    "scaled_add": DOCUMENT_003,
    "concat": replace(DOCUMENT_003, per_layer_combination_method="concat", per_layer_position="after_mlp"),
    "gated": replace(DOCUMENT_003, per_layer_combination_method="gated", per_layer_lr_scale=0.5),
    "gemma4": replace(DOCUMENT_003, per_layer_preset="gemma4", per_layer_vocab_size=VOCAB_SIZE),
}


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        settings = VARIANTS[self.variant]
        return [PerLayerFamily(settings, VOCAB_SIZE, None if settings.uses_token_ids else TABLE)]


@dataclass
class Run:
    """What one variant gave at one cut, on one rank."""

    trace: TrainingTrace
    saved: set[tuple[str, tuple[int, ...]]]
    """Key and global shape of every tensor that this rank saves as its owner."""


def _train(cuts: dict[str, ParallelConfig], bf16: bool = False) -> dict[str, dict[str, Run]]:
    """Every variant at every parallel layout, in one set of processes."""
    return {
        cut: {
            name: Run(train_tiny(parallel, STEPS, _Make(name), bf16=bf16), _saved(parallel, name))
            for name in VARIANTS
        }
        for cut, parallel in cuts.items()
    }


def _saved(parallel: ParallelConfig, variant: str) -> set[tuple[str, tuple[int, ...]]]:
    extensions = [family.extension() for family in _Make(variant)()]
    chunks = build_model(TINY, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)
    found = [
        (value.key, value.global_shape, value.global_offset)
        for chunk in chunks
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values()
        if isinstance(value, ShardedTensor) and not any(value.replica_id)
    ]
    assert len(set(found)) == len(found), "a tensor has two owners"
    return {(key, shape) for key, shape, _ in found}


@functools.cache
def runs(world_size: int) -> list[dict[str, dict[str, Run]]]:
    """All runs with this number of processes, by rank, cut and variant."""
    cuts = {
        name: EVERY_LAYOUT[name.removesuffix(RECOMPUTED)] for name in CASES if _world_size(name) == world_size
    }
    for name in cuts:
        if name.endswith(RECOMPUTED):
            cuts[name] = with_full_recompute(cuts[name])
    return run_distributed(_train, world_size, cuts)


def _world_size(case: str) -> int:
    return WORLD_SIZES.get(case.removesuffix(RECOMPUTED), 2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES[1:])
def test_every_cut_trains_logs_and_saves_as_the_single_process_does(case: str, variant: str) -> None:
    expected = runs(1)[0]["TP1"][variant]
    found = [of_rank[case][variant] for of_rank in runs(_world_size(case))]
    trace = found[0].trace
    assert trace.losses[0] == pytest.approx(expected.trace.losses[0], rel=1e-6)
    assert trace.losses == pytest.approx(expected.trace.losses, rel=1e-5)
    assert trace.grad_norms == pytest.approx(expected.trace.grad_norms, rel=1e-4)
    if not case.endswith("optimizer"):  # which keeps only parts of the gradients
        _assert_same_gradients(assemble([run.trace for run in found]), assemble([expected.trace]))
    assert trace.statistics.keys() == expected.trace.statistics.keys()
    for tag, value in expected.trace.statistics.items():
        assert trace.statistics[tag] == pytest.approx(value, rel=1e-3, abs=1e-6), tag
    assert set().union(*(run.saved for run in found)) == expected.saved


def _assert_same_gradients(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.linalg.norm(gradients[key] - gradient) < 1e-5 * torch.linalg.norm(gradient), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_and_every_layer_its_statistics(variant: str) -> None:
    run = runs(1)[0]["TP1"][variant]
    gradients = assemble([run.trace])
    per_layer = [
        key
        for key in gradients
        if key.startswith("per_layer.") or ".before_layer." in key or ".after_mlp." in key
    ]
    weights = 5 if VARIANTS[variant].per_layer_combination_method == "scaled_add" else 6
    assert len(per_layer) == TINY.num_layers * weights + 1
    assert all(float(gradients[key].abs().max()) > 0 for key in per_layer)
    layers = {tag.rpartition("/")[2] for tag in run.trace.statistics}
    assert layers == {f"layer_{number:02d}" for number in range(TINY.num_layers)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_layer_owns_at_stage_level_is_saved_under_the_layers_global_number(variant: str) -> None:
    saved = dict(runs(1)[0]["TP1"][variant].saved)
    for number in range(TINY.num_layers):
        rows = VARIANTS[variant].rows(VOCAB_SIZE)
        assert saved[f"per_layer.layers.{number}.embedding.weight"] == (rows, 8)
        assert saved[f"per_layer.layers.{number}.context_projection.weight"] == (8, TINY.hidden_size)
    assert saved["per_layer.norm.weight"] == (8,)


def test_bf16_follows_fp32() -> None:
    rounded = run_distributed(_train, 2, {"TP2+SP": LAYOUTS["TP2+SP"]}, True)[0]["TP2+SP"]
    for variant, run in rounded.items():
        assert run.trace.losses == pytest.approx(runs(1)[0]["TP1"][variant].trace.losses, rel=1e-2), variant
