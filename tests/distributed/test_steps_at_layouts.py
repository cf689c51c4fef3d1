"""A step on several ranks: a NaN on one changes nothing on any, and AdamW is AdamW."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS, WORLD_SIZES, synthetic_batches
from megatron_ext.training.interface.family_interface import Batch
from tests.unit.training.test_training_step import MODEL, against_adamw, assert_adamw, make_stepper, snapshot


@pytest.mark.parametrize("poison", ["weight", "mask"])
@pytest.mark.parametrize("layout", ["DP2", "DP2 distributed optimizer", "TP2", "PP2", "TP2xPP2"])
def test_nan_on_one_rank_changes_nothing_on_any(layout: str, poison: str) -> None:
    results = run_distributed(_poisoned, WORLD_SIZES[layout], LAYOUTS[layout], poison)
    for before, after, moments, skipped, healed in results:
        assert skipped == [False, True, False]
        assert before.keys() == after.keys()
        assert moments, "no optimizer state was compared"
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
        assert not torch.equal(healed["schedule"], after["schedule"])
        assert all(bool(value.isfinite().all()) for value in healed.values())


def _poisoned(parallel: ParallelConfig, poison: str) -> tuple[Any, ...]:
    """A good step; one with a NaN on the last rank alone; a good one."""
    chunks, stepper = make_stepper(parallel)
    batches = synthetic_batches(MODEL.seq_length)
    skipped = [stepper.train(batches, 1).skipped]
    before = snapshot(chunks, stepper)
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    weight = next(p for name, p in chunks[-1].named_parameters() if name.endswith("linear_fc2.weight"))
    kept = weight.detach()[0, 0].clone()
    if last and poison == "weight":
        weight.data[0, 0] = float("nan")
    poisoned = _with_nan(batches) if last and poison == "mask" else batches
    skipped.append(stepper.train(poisoned, 2).skipped)
    # On every rank: with the distributed optimizer a rank's part of a weight is the weight, and the others have got it.
    weight.data[0, 0] = kept
    after = snapshot(chunks, stepper)
    skipped.append(stepper.train(batches, 3).skipped)
    return before, after, [n for n in before if "exp_avg" in n], skipped, snapshot(chunks, stepper)


def _with_nan(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        batch["loss_mask"][0, 3] = float("nan")
        yield batch


def test_three_steps_of_the_distributed_optimizer_equal_a_float64_adamw() -> None:
    for parameters in run_distributed(against_adamw, 2, LAYOUTS["DP2 distributed optimizer"]):
        assert_adamw(parameters)
