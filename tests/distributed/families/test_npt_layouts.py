"""The same NPT run at every parallel layout: losses, gradient norms, first gradients, checkpoint keys, adapters; with
PLE too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.np_factors import gather_np_factors, load_np_factors
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
MODEL = replace(TINY, init_method_std=0.1)
FULL, SELECTIVE = " recomputed", " MLP recomputed"
CASES = [*LAYOUTS, *(f"{cut}{FULL}" for cut in ("TP1", "TP2+SP", "PP2 interleaved")), f"TP2+SP{SELECTIVE}"]

OUTER = NPTModuleConfig(
    npt_layers="all",
    np_form="outer_product",
    np_target="gate+up+down",
    np_rank=8,
    num_np_components=2,
    np_residual="keep",
    np_init_scale=0.05,  # much larger, and rounding errors grow a thousandfold over four layers
)
LOW_RANK = replace(OUTER, np_form="low_rank", num_np_components=1, np_residual="drop", np_init_scale=0.5)
UPPER = replace(LOW_RANK, npt_layers="upper_half", np_target="gate", freeze_base=False)
PLE = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=24, per_layer_hidden_size=8)


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        settings = {
            "outer": OUTER,
            "low_rank": LOW_RANK,
            "upper half, base trains": UPPER,
            "frozen stage": None,
        }
        if self.variant == "with PLE":
            table = [token % 24 for token in range(VOCAB_SIZE)]
            return [PerLayerFamily(PLE, VOCAB_SIZE, table), NPTFamily(replace(OUTER, npt_layers="1,3"))]
        return [NPTFamily(settings[self.variant] or replace(LOW_RANK, npt_layers="upper_half"))]


VARIANTS = ("outer", "low_rank", "upper half, base trains", "frozen stage", "with PLE")
"""`frozen stage`: with two stages the first one has nothing to train."""


@dataclass
class Run:
    """What one variant gave at one cut, on one rank."""

    trace: TrainingTrace
    saved: set[tuple[str, tuple[int, ...]]]
    """Key and global shape of every tensor that this rank saves as its owner."""

    adapter: dict[str, torch.Tensor]
    """Before training."""


def _train(cuts: dict[str, ParallelConfig], bf16: bool = False) -> dict[str, dict[str, Run]]:
    """Every variant at every parallel layout, in one set of processes."""
    return {
        cut: {
            name: Run(
                train_tiny(parallel, STEPS, _Make(name), model=MODEL, bf16=bf16), *_model(parallel, name)
            )
            for name in VARIANTS
        }
        for cut, parallel in cuts.items()
    }


def _model(
    parallel: ParallelConfig, variant: str
) -> tuple[set[tuple[str, tuple[int, ...]]], dict[str, torch.Tensor]]:
    """What is saved of the variant's model, and its adapter after a round trip."""
    extensions = [family.extension() for family in _Make(variant)()]
    chunks = build_model(MODEL, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=extensions)
    found = []
    for chunk in chunks:
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values():
            shards = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            found += [
                (shard.key, shard.global_shape, shard.global_offset)
                for shard in shards
                if isinstance(shard, ShardedTensor) and not any(shard.replica_id)
            ]
    assert len(set(found)) == len(found), "a tensor has two owners"
    adapter = gather_np_factors(chunks)
    load_np_factors(chunks, {key: 2 * tensor for key, tensor in adapter.items()})
    for key, tensor in gather_np_factors(chunks).items():
        assert torch.equal(tensor, 2 * adapter[key]), key
    return {(key, shape) for key, shape, _ in found}, adapter


@functools.cache
def runs(world_size: int) -> list[dict[str, dict[str, Run]]]:
    """All runs with this number of processes, by rank, cut and variant."""
    cuts = {name: _parallel(name) for name in CASES if _world_size(name) == world_size}
    return run_distributed(_train, world_size, cuts)


def _cut(case: str) -> str:
    return case.removesuffix(SELECTIVE).removesuffix(FULL)


def _parallel(case: str) -> ParallelConfig:
    parallel = LAYOUTS[_cut(case)]
    if case.endswith(SELECTIVE):
        return replace(parallel, recompute_granularity="selective", recompute_modules=("core_attn", "mlp"))
    return with_full_recompute(parallel) if case.endswith(FULL) else parallel


def _world_size(case: str) -> int:
    return WORLD_SIZES[_cut(case)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES[1:])
def test_every_cut_trains_and_saves_as_the_single_process_does(case: str, variant: str) -> None:
    expected = runs(1)[0]["TP1"][variant]
    found = [of_rank[case][variant] for of_rank in runs(_world_size(case))]
    trace = found[0].trace
    assert trace.losses[0] == pytest.approx(expected.trace.losses[0], rel=1e-6)
    assert trace.losses == pytest.approx(expected.trace.losses, rel=1e-5)
    assert trace.grad_norms == pytest.approx(expected.trace.grad_norms, rel=1e-4)
    if not case.endswith("optimizer"):  # which keeps only parts of the gradients
        _assert_same_gradients(assemble([run.trace for run in found]), assemble([expected.trace]))
    assert set().union(*(run.saved for run in found)) == expected.saved
    for run in found:
        assert list(run.adapter) == list(expected.adapter)
        assert all(torch.equal(run.adapter[key], tensor) for key, tensor in expected.adapter.items())


def _assert_same_gradients(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.linalg.norm(gradients[key] - gradient) < 1e-5 * torch.linalg.norm(gradient), key


def _is_np(key: str) -> bool:
    return ".feed_forward." in key


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_np_parameters_get_gradients_and_of_the_base_only_what_trains(variant: str) -> None:
    gradients = assemble([runs(1)[0]["TP1"][variant].trace])
    saved = {key for key, _ in runs(1)[0]["TP1"][variant].saved}
    trained: Callable[[str], bool] = {
        "upper half, base trains": lambda key: True,
        "with PLE": lambda key: _is_np(key) or ".before_layer." in key or key.startswith("per_layer."),
    }.get(variant, _is_np)
    assert gradients.keys() == {key for key in saved if trained(key)}
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


H, F = MODEL.hidden_size, MODEL.resolved_ffn_hidden_size
ADAPTERS: dict[str, tuple[tuple[int, ...], tuple[str, ...], dict[str, tuple[int, ...]]]] = {
    "outer": (
        (0, 1, 2, 3),
        (".0", ".1"),
        {
            **{f"{target}.W_down": (H, 8) for target in ("gate", "up", "down")},
            **{f"{target}.W_a_up": (8, H) for target in ("gate", "up")},
            **{f"{target}.c_a": (H,) for target in ("gate", "up")},
            **{f"{target}.W_b_up": (8, F) for target in ("gate", "up")},
            "down.W_a_up": (8, F),
            "down.c_a": (F,),
            "down.W_b_up": (8, H),
        },
    ),
    "low_rank": (
        (0, 1, 2, 3),
        ("",),
        {
            **{f"{target}.A": (H, 8) for target in ("gate", "up", "down")},
            **{f"{target}.B": (8, F) for target in ("gate", "up")},
            "down.A_in": (F, 8),
            "down.B": (8, H),
        },
    ),
    "upper half, base trains": ((2, 3), ("",), {"gate.A": (H, 8), "gate.B": (8, F)}),
}
"""Layers, suffixes of components, and the shape of each factor."""


@pytest.mark.parametrize("variant", ADAPTERS)
def test_adapters_are_named_by_layer_target_factor_and_component(variant: str) -> None:
    layers, components, shapes = ADAPTERS[variant]
    found = {key: tuple(tensor.shape) for key, tensor in runs(1)[0]["TP1"][variant].adapter.items()}
    assert found == {
        f"layer_{layer}_np.{name}{component}": shape
        for layer in layers
        for component in components
        for name, shape in shapes.items()
    }


def test_bf16_follows_fp32() -> None:
    rounded = run_distributed(_train, 2, {"TP2+SP": LAYOUTS["TP2+SP"]}, True)[0]["TP2+SP"]
    for variant, run in rounded.items():
        assert run.trace.losses == pytest.approx(runs(1)[0]["TP1"][variant].trace.losses, rel=2e-2), variant
