"""Adapted layers at every parallel layout: losses, gradients, what is saved and what moves, against the single
process.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import (
    LAYOUTS,
    WORLD_SIZES,
    TrainingTrace,
    assemble,
    train_tiny,
    with_full_recompute,
)
from tests.unit.progressive.progressive_helpers import DUAL, MODEL, MakeAdapted, build

STEPS = 2
CASES = {
    **{cut: (LAYOUTS[cut], WORLD_SIZES[cut]) for cut in LAYOUTS},
    "TP2+SP recomputed": (with_full_recompute(LAYOUTS["TP2+SP"]), 2),
    "TP2+SP selective": (
        replace(LAYOUTS["TP2+SP"], recompute_granularity="selective", recompute_modules=("core_attn", "mlp")),
        2,
    ),
}
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


@dataclass
class Run:
    """What one plan gave at one cut, on one rank."""

    trace: TrainingTrace
    saved: set[tuple[str, tuple[int, ...]]]


PLANS_OF = {
    "DP2": ["adapters"],
    "DP2 distributed optimizer": ["trunk frozen, base and adapters above"],
    "TP2xPP2": ["trunk frozen, base and adapters above"],
    "TP2+SP recomputed": ["adapters"],
    "TP2+SP selective": ["adapters"],
}
"""Cuts that try some plans only; the others try all."""


def _train(cuts: dict[str, ParallelConfig]) -> dict[str, dict[str, Run]]:
    return {
        cut: {
            name: Run(
                train_tiny(parallel, STEPS, MakeAdapted(PLANS[name]), model=MODEL), _saved(parallel, name)
            )
            for name in PLANS_OF.get(cut, PLANS)
        }
        for cut, parallel in cuts.items()
    }


def _saved(parallel: ParallelConfig, plan: str) -> set[tuple[str, tuple[int, ...]]]:
    """Key and whole shape of every tensor that this rank saves as its owner."""
    found = []
    for chunk in build(PLANS[plan], parallel):
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values():
            shards = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            found += [
                (shard.key, shard.global_shape, shard.global_offset)
                for shard in shards
                if isinstance(shard, ShardedTensor) and not any(shard.replica_id)
            ]
    assert len(set(found)) == len(found), "a tensor has two owners"
    return {(key, shape) for key, shape, _ in found}


@functools.cache
def runs(world_size: int) -> list[dict[str, dict[str, Run]]]:
    """All runs with this number of processes, by rank, cut and plan."""
    cuts = {name: parallel for name, (parallel, size) in CASES.items() if size == world_size}
    return run_distributed(_train, world_size, cuts)


@pytest.mark.parametrize(
    ("case", "plan"), [(case, plan) for case in list(CASES)[1:] for plan in PLANS_OF.get(case, PLANS)]
)
def test_every_cut_trains_and_saves_as_the_single_process_does(case: str, plan: str) -> None:
    expected = runs(1)[0]["TP1"][plan]
    found = [of_rank[case][plan] for of_rank in runs(CASES[case][1])]
    exact = (
        "half" not in plan
    )  # else the products are rounded to 11 or 8 bits, and those of parts differently
    trace = found[0].trace
    assert trace.losses == pytest.approx(expected.trace.losses, rel=1e-5 if exact else 1e-2)
    assert trace.grad_norms == pytest.approx(expected.trace.grad_norms, rel=1e-4 if exact else 2e-2)
    if not case.endswith("optimizer"):  # which keeps only parts of the gradients
        gradients, wanted = assemble([run.trace for run in found]), assemble([expected.trace])
        assert gradients.keys() == wanted.keys()
        for key, gradient in wanted.items():
            tolerance = (1e-5 if exact else 5e-2) * torch.linalg.norm(gradient)
            assert torch.linalg.norm(gradients[key] - gradient) < tolerance, key
    assert set().union(*(run.saved for run in found)) == expected.saved


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
    found = {plan: assemble([run.trace]) for plan, run in runs(1)[0]["TP1"].items()}
    everywhere = _layer_keys(range(4), ADAPTER_NAMES) | OTHERS
    assert found["adapters"].keys() == everywhere
    above = _layer_keys(range(2, 4), ADAPTER_NAMES | BASE_NAMES) | OTHERS
    assert found["trunk frozen, base and adapters above"].keys() == above
    mixed = everywhere | _layer_keys(range(2, 3), BASE_NAMES)
    assert found["bfloat16 below half"].keys() == mixed
    for gradients in found.values():
        assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())


def test_precision_does_not_change_the_gradients_much() -> None:
    exact, mixed = (assemble([runs(1)[0]["TP1"][plan].trace]) for plan in ("adapters", "bfloat16 below half"))
    for key, gradient in exact.items():
        assert torch.linalg.norm(mixed[key] - gradient) < 5e-2 * torch.linalg.norm(gradient), key


def test_the_base_keeps_its_names_and_shapes_in_a_checkpoint() -> None:
    plain = {(key, shape) for key, shape in run_distributed(_saved_plain, 1)[0]}
    saved = runs(1)[0]["TP1"]["adapters"].saved
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


def _saved_plain() -> set[tuple[str, tuple[int, ...]]]:
    found = set()
    for chunk in build({}):
        for value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).values():
            shards = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            found |= {(shard.key, shard.global_shape) for shard in shards if isinstance(shard, ShardedTensor)}
    return found
