"""The same run at every cut: losses, gradient norms, first gradients of all parameters, statistics, checkpoint keys."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.models.build import build_model
from megatron_ext.models.init import CHECKPOINT_METADATA
from megatron_ext.per_layer.config import PerLayerConfig
from megatron_ext.per_layer.family import PerLayerFamily
from megatron_ext.testing.distributed import run_distributed
from megatron_ext.testing.training import (
    CUTS,
    TINY,
    VOCAB_SIZE,
    WORLD_SIZES,
    TrainingTrace,
    assemble,
    train_tiny,
    with_full_recompute,
)
from megatron_ext.training.family import Family

STEPS = 3
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


Result = tuple[TrainingTrace, set[tuple[str, tuple[int, ...]]]]


def _train(parallel: ParallelConfig, variants: list[str]) -> dict[str, Result]:
    return {name: (train_tiny(parallel, STEPS, _Make(name)), _keys(parallel, name)) for name in variants}


def _keys(parallel: ParallelConfig, variant: str) -> set[tuple[str, tuple[int, ...]]]:
    """Key and global shape of every tensor that this rank would save as its owner."""
    extensions = [family.extension() for family in _Make(variant)()]
    chunks = build_model(TINY, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)
    found = []
    for chunk in chunks:
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values():
            if isinstance(value, ShardedTensor) and not any(value.replica_id):
                found.append((value.key, value.global_shape, value.global_offset))
    assert len(set(found)) == len(found), "a tensor has two owners"
    return {(key, shape) for key, shape, _ in found}


def _run(parallel: ParallelConfig, world_size: int, variants: list[str]) -> dict[str, list[Result]]:
    ranks = run_distributed(_train, world_size, parallel, variants)
    return {name: [of_rank[name] for of_rank in ranks] for name in variants}


@pytest.fixture(scope="module")
def single() -> dict[str, list[Result]]:
    return _run(CUTS["TP1"], 1, list(VARIANTS))


def _cases() -> list[Any]:
    cases = []
    for name, parallel in CUTS.items():
        if name != "TP1":
            cases.append(pytest.param(parallel, WORLD_SIZES[name], id=name))
        if name != "DP2":
            cases.append(
                pytest.param(with_full_recompute(parallel), WORLD_SIZES[name], id=f"{name} recompute")
            )
    return cases


@pytest.mark.parametrize(("parallel", "world_size"), _cases())
def test_every_cut_trains_logs_and_saves_as_the_single_process_does(
    single: dict[str, list[Result]], parallel: ParallelConfig, world_size: int
) -> None:
    for name, results in _run(parallel, world_size, list(VARIANTS)).items():
        ((expected, expected_keys),) = single[name]
        trace = results[0][0]
        torch.testing.assert_close(trace.losses[0], expected.losses[0], rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(trace.losses, expected.losses, rtol=1e-5, atol=0, msg=name)
        torch.testing.assert_close(trace.grad_norms, expected.grad_norms, rtol=1e-4, atol=0, msg=name)
        if not parallel.use_distributed_optimizer:
            _assert_same_gradients(assemble([trace for trace, _ in results]), assemble([expected]), name)
        assert trace.statistics.keys() == expected.statistics.keys()
        for tag, value in expected.statistics.items():
            assert trace.statistics[tag] == pytest.approx(value, rel=1e-3, abs=1e-6), f"{name}: {tag}"
        assert set().union(*(keys for _, keys in results)) == expected_keys


def _assert_same_gradients(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], variant: str
) -> None:
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(
            gradient,
            expected[key],
            rtol=1e-4,
            atol=1e-5 * scale,
            msg=lambda text, key=key: f"{variant} {key}: {text}",
        )


def test_every_parameter_gets_a_gradient_and_every_layer_its_statistics(
    single: dict[str, list[Result]],
) -> None:
    for name, ((trace, _),) in single.items():
        gradients = assemble([trace])
        per_layer = [
            key
            for key in gradients
            if key.startswith("per_layer.") or ".before_layer." in key or ".after_mlp." in key
        ]
        weights = 5 if name in ("scaled_add", "gemma4") else 6
        assert len(per_layer) == TINY.num_layers * weights + 1
        assert all(float(gradients[key].abs().max()) > 0 for key in per_layer)
        layers = {tag.rpartition("/")[2] for tag in trace.statistics}
        assert layers == {f"layer_{number:02d}" for number in range(TINY.num_layers)}
        assert all(tag.startswith("per-layer/") for tag in trace.statistics)


def _bf16(parallel: ParallelConfig) -> dict[str, list[float]]:
    make: dict[str, Callable[[], list[Family]]] = {name: _Make(name) for name in VARIANTS}
    return {name: train_tiny(parallel, STEPS, function, bf16=True).losses for name, function in make.items()}


def test_bf16_follows_fp32_at_two_tensor_parallel_ranks(single: dict[str, list[Result]]) -> None:
    for name, losses in run_distributed(_bf16, 2, CUTS["TP2+SP"])[0].items():
        torch.testing.assert_close(losses, single[name][0][0].losses, rtol=2e-2, atol=0, msg=name)
