"""The activation cache: the same losses to the bit, no stale hit, and what happens to directories."""

import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.progressive.cache import activation_cache
from megatron_ext.progressive.cache.activation_cache import ActivationCache, check_cache_directory
from megatron_ext.progressive.cache.frozen_trunk import trunk_fingerprint
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import CONTEXT_LAYOUTS, LAYOUTS, WORLD_SIZES, with_full_recompute
from tests.unit.progressive.objective_helpers import (
    MLM,
    MODEL,
    ObjectiveFamily,
    Trained,
    batches,
    build_stepper,
    train,
)
from tests.unit.progressive.progressive_helpers import DUAL, STACK, build

SAMPLES, STEPS = 4, 2
"""Two epochs, each of one step."""

INPUT = replace(MLM, time_interpretation="input")
CLM = replace(MLM, training_objective="clm")
DROPOUT = replace(MODEL, hidden_dropout=0.3, attention_dropout=0.3)


@dataclass(frozen=True)
class Case:
    """A training, with and without cache."""

    layout: ParallelConfig
    world_size: int
    trunk: int = 2
    config: Any = MLM
    model: Any = MODEL
    precision: Precision = "fp32"


CASES = {
    **{layout: Case(LAYOUTS[layout], WORLD_SIZES[layout]) for layout in LAYOUTS if layout != "TP2xPP2"},
    "CP2": Case(*CONTEXT_LAYOUTS["CP2"]),
    "CP2, clm": Case(*CONTEXT_LAYOUTS["CP2"], config=CLM),
    "one layer above": Case(ParallelConfig(), 1, trunk=3),
    "time embedding": Case(ParallelConfig(), 1, config=INPUT),
    "clm": Case(ParallelConfig(), 1, config=CLM),
    "dropout above the trunk": Case(ParallelConfig(), 1, model=DROPOUT),
    "bf16": Case(LAYOUTS["TP2+SP"], 2, precision="bf16"),
    "recomputed": Case(with_full_recompute(ParallelConfig()), 1, trunk=1),
    "PP2, trunk ends on the second stage": Case(LAYOUTS["PP2"], 2, trunk=3),
    "PP2 recomputed, trunk ends on the first stage": Case(with_full_recompute(LAYOUTS["PP2"]), 2, trunk=1),
    "PP2 interleaved, chunks of trunk alone": Case(LAYOUTS["PP2 interleaved"], 2, trunk=3),
}


def _both(cases: dict[str, Case], folder: str) -> dict[str, dict[str, Trained]]:
    found: dict[str, dict[str, Trained]] = {}
    for number, (name, case) in enumerate(cases.items()):
        on_disk = replace(case.config, cache_dir=f"{folder}/{number}")
        ways = {
            "uncached": (case.config, False),
            "memory": (case.config, True),
            "disk": (on_disk, True),
            "disk again": (on_disk, True),
        }
        found[name] = {
            way: train(
                case.layout,
                ObjectiveFamily(config, trunk_layers=case.trunk, cached=cached),
                STEPS,
                num_samples=SAMPLES,
                model=case.model,
                precision=case.precision,
            )
            for way, (config, cached) in ways.items()
        }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@functools.cache
def _runs(world_size: int, folder: str) -> list[dict[str, dict[str, Trained]]]:
    cases = {name: case for name, case in CASES.items() if case.world_size == world_size}
    return run_distributed(_both, world_size, cases, f"{folder}/{world_size}")


@pytest.mark.parametrize("name", CASES)
def test_cached_and_uncached_training_are_equal_to_the_bit(name: str, folder: Path) -> None:
    found = _runs(CASES[name].world_size, str(folder))[0][name]
    expected = found.pop("uncached")
    assert len(set(expected.losses)) == STEPS
    for trained in found.values():
        assert trained.losses == expected.losses
        assert trained.grad_norms == expected.grad_norms
        assert trained.evaluation == expected.evaluation


@pytest.mark.parametrize("name", CASES)
def test_the_second_epoch_hits_and_on_disk_the_second_run_from_its_first_step(
    name: str, folder: Path
) -> None:
    found = _runs(CASES[name].world_size, str(folder))[0][name]
    rates = {way: [v["cache/hit_rate"] for v in found[way].values] for way in found if way != "uncached"}
    assert rates == {"memory": [0, 1], "disk": [0, 1], "disk again": [1, 1]}
    holders = 2 if name == "TP2" else 1
    size = (
        SAMPLES
        * MODEL.seq_length
        * MODEL.hidden_size
        * (2 if CASES[name].precision == "bf16" else 4)
        * holders
    )
    assert {found[way].values[-1]["cache/bytes"] for way in rates} == {size}


def _what_runs() -> dict[str, list[int]]:
    """How often each layer is called in the first and in the second epoch, and in an evaluation."""
    stepper, (chunk,) = build_stepper(ParallelConfig(), ObjectiveFamily(MLM, trunk_layers=2, cached=True))
    calls = [0] * 4
    for number, layer in enumerate(chunk.decoder.layers):
        layer.self_attention.register_forward_hook(
            lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)
        )
    data = batches(4)
    found = {}
    for name in ("first", "second"):
        stepper.train(data, 1)
        found[name], calls[:] = list(calls), [0] * 4
    stepper.evaluate(lambda: batches(4), 1)
    found["evaluation"] = list(calls)
    return found


def test_a_hit_skips_the_trunk_and_an_evaluation_does_not() -> None:
    found = run_single(_what_runs)
    assert found == {"first": [4, 4, 4, 4], "second": [0, 0, 4, 4], "evaluation": [4, 4, 4, 4]}


def _hit_rate(directory: str, change: str = "", **options: Any) -> float:
    """Of the first step of a new run on this directory; `change` is a parameter to which a little is added."""
    config = replace(options.pop("config", INPUT), cache_dir=directory)
    data = batches(8, seed=options.pop("data_seed", 0), micro=options.get("micro", 1))
    micro = options.pop("micro", 1)
    model = options.pop("model", MODEL)
    family = ObjectiveFamily(config, trunk_layers=2, cached=True, **options)
    stepper, (chunk,) = build_stepper(ParallelConfig(), family, model, micro=micro)
    if change:
        with torch.no_grad():
            chunk.get_parameter(change).view(-1)[0] += 1e-3
    stepper.train(data, 1)
    assert family.cache is not None
    rate = family.cache.values()["cache/hit_rate"]
    family.cache.close()
    return rate


def _stale(folder: str) -> dict[str, tuple[float, float]]:
    """Hit rate of a run like one before, and of one that differs in something."""
    found = {}
    changes: dict[str, dict[str, Any]] = {
        "a trunk weight": {"change": "decoder.layers.1.mlp.linear_fc2.weight"},
        "the embedding": {"change": "embedding.word_embeddings.weight"},
        "the time embedding": {"change": "objective.projection"},
        "the mask seed": {"mask_seed": 2},
        "the data": {"data_seed": 3},
        "the micro-batch": {"micro": 2},
        "the norm's epsilon": {"model": replace(MODEL, norm_epsilon=1e-3)},
        "a weight above": {"change": "decoder.layers.2.mlp.linear_fc2.weight"},
        "the head": {"change": "output_layer.weight"},
    }
    for number, (name, options) in enumerate(changes.items()):
        directory = f"{folder}/{number}"
        assert _hit_rate(directory) == 0
        found[name] = _hit_rate(directory), _hit_rate(directory, **options)
    return found


def test_a_stale_cache_is_never_used(tmp_path: Path) -> None:
    found = run_single(_stale, str(tmp_path))
    expected = dict.fromkeys(found, (1.0, 0.0))
    expected["a weight above"] = expected["the head"] = (1.0, 1.0)
    assert found == expected


def _fingerprints() -> list[bytes]:
    """Of trunks with equal weights."""
    other_alpha = replace(DUAL, adapters={**DUAL.adapters, "stack": replace(STACK, alpha=9)})
    plans = [{0: DUAL}, {0: DUAL}, {0: other_alpha}, {0: replace(DUAL, precision="full")}, {0: DUAL, 2: DUAL}]
    found = []
    for plan in plans:
        chunks = build(plan)
        found.append(trunk_fingerprint(chunks, [], 2, {}))
    return [*found, trunk_fingerprint(chunks, [], 1, {}), trunk_fingerprint(chunks, [], 2, {"seed": 2})]


def test_the_fingerprint_knows_adapters_precision_depth_and_identity() -> None:
    first, same, alpha, precision, above, depth, identity = run_single(_fingerprints)
    assert first == same == above
    assert len({first, alpha, precision, depth, identity}) == 5


def _changed_while_running() -> list[float]:
    family = ObjectiveFamily(MLM, trunk_layers=2, cached=True)
    stepper, (chunk,) = build_stepper(ParallelConfig(), family)
    rates = []
    assert family.cache is not None
    for step in range(1, 5):
        if step == 3:
            with torch.no_grad():
                chunk.get_parameter("decoder.layers.0.mlp.linear_fc1.weight").mul_(1.01)
        stepper.train(batches(4), step)
        rates.append(family.cache.values()["cache/hit_rate"])
    return rates


def test_a_weight_that_is_changed_while_running_is_noticed() -> None:
    assert run_single(_changed_while_running) == [0, 1, 0, 1]


def _damaged_or_full(folder: str) -> dict[str, Trained]:
    steps = 4  # two epochs of eight samples
    disk = replace(MLM, cache_dir=folder)
    made = functools.partial(ObjectiveFamily, trunk_layers=2, cached=True)
    whole = train(ParallelConfig(), made(disk), steps)
    for path in Path(folder).rglob("*.data"):
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    tensor = MODEL.seq_length * MODEL.hidden_size * 4
    small = replace(MLM, cache_dir=f"{folder}-small", cache_max_gb=3.5 * tensor / 2**30)
    cannot_write = ActivationCache._claim_directory

    def full(self: ActivationCache) -> None:
        raise OSError(28, "No space left on device", folder)

    found = {
        "whole": whole,
        "damaged": train(ParallelConfig(), made(disk), steps),
        "small": train(ParallelConfig(), made(small), steps),
    }
    try:
        activation_cache.ActivationCache._claim_directory = full  # type: ignore[method-assign]
        found["full"] = train(ParallelConfig(), made(replace(MLM, cache_dir=f"{folder}-full")), steps)
    finally:
        activation_cache.ActivationCache._claim_directory = cannot_write  # type: ignore[method-assign]
    return found


def test_a_damaged_file_and_a_full_directory_fall_back_to_computing(tmp_path: Path) -> None:
    found = run_single(_damaged_or_full, str(tmp_path / "cache"))
    rates = {name: [value["cache/hit_rate"] for value in run.values] for name, run in found.items()}
    assert rates["whole"] == [0, 0, 1, 1]
    assert rates["damaged"] == [0.75, 1, 1, 1]
    assert rates["small"] == [0, 0, 0.75, 0]
    assert rates["full"] == [0, 0, 0, 0]
    for run in found.values():
        assert run.losses == found["whole"].losses


def _moved_between_ranks(folder: str) -> list[float]:
    """The second run's data-parallel ranks read each other's samples of the first."""
    config = replace(MLM, cache_dir=folder)
    rates = []
    for first in (0, 1):
        family = ObjectiveFamily(config, trunk_layers=2, cached=True)
        trained = train(LAYOUTS["DP2"], family, 2, first=first)
        rates += [value["cache/hit_rate"] for value in trained.values]
    return rates


def test_on_disk_a_rank_finds_what_another_has_kept(tmp_path: Path) -> None:
    assert run_distributed(_moved_between_ranks, 2, str(tmp_path))[0] == [0, 0, 1, 1]


def _with_a_trunk_that_trains() -> str:
    family = ObjectiveFamily(MLM, trunk_layers=2, cached=True)
    model = replace(MODEL, untie_embeddings_and_output_weights=False)
    stepper, (chunk,) = build_stepper(ParallelConfig(), family, model)
    chunk.embedding.requires_grad_(True)
    with pytest.raises(ValueError, match="--cache-activations") as error:
        stepper.train(batches(4), 1)
    return str(error.value)


def test_a_trunk_that_trains_is_refused_by_name() -> None:
    message = run_single(_with_a_trunk_that_trains)
    assert (
        "embedding.word_embeddings.weight is trainable, but --cache-activations requires a frozen trunk; "
        "pass --untie-embeddings-and-output-weights" in message
    )


def test_a_directory_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = replace(MLM, cache_dir=str(tmp_path))
    identity = {"hidden_size": 32, "tokenizer": "a"}
    check_cache_directory(config, identity)
    (tmp_path / "cache.json").write_text(json.dumps({"identity": identity}))
    (tmp_path / "0123").mkdir()
    check_cache_directory(config, identity)
    with pytest.raises(
        ValueError, match=rf"--cache-dir {tmp_path}: belongs to another run \(its hidden_size is 32"
    ):
        check_cache_directory(config, identity | {"hidden_size": 64})
    with pytest.raises(ValueError, match="belongs to another run"):
        ActivationCache(config, trunk_layers=2, identity={})
    assert sorted(os.listdir(tmp_path)) == ["0123", "cache.json"]


@pytest.mark.parametrize("content", [None, "not JSON", "[]"])
def test_a_directory_that_is_no_cache_is_refused(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if content is not None:
        (tmp_path / "cache.json").write_text(content)
    with pytest.raises(ValueError, match="must be empty, or contain an activation cache"):
        check_cache_directory(replace(MLM, cache_dir=str(tmp_path)), {})
    with pytest.raises(ValueError, match="notes.txt: must be a directory"):
        check_cache_directory(replace(MLM, cache_dir=str(tmp_path / "notes.txt")), {})
