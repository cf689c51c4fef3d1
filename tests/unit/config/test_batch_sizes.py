"""The batch sizes of a ramp are those of megatron-core's calculator, and lengths in steps and samples fit together."""

from typing import Any

import pytest
from megatron.core import num_microbatches_calculator

from megatron_ext.config.groups.batch_sizes import BatchSizes, in_samples, read_schedule
from megatron_ext.config.groups.training_config import TrainingConfig

EngineRamp: Any = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)
needs_ramp = pytest.mark.skipif(
    EngineRamp is None, reason="from 0.18 megatron-core has a schedule of steps, no ramp"
)
RAMPS = [(64, (16, 16, 1000)), (40, (8, 4, 333)), (12, (2, 10, 7)), (96, (32, 32, 64)), (9, (3, 2, 5))]


@needs_ramp
@pytest.mark.parametrize(("final", "ramp"), RAMPS)
def test_the_size_of_every_step_is_that_of_the_engines_calculator(
    final: int, ramp: tuple[int, int, int]
) -> None:
    engine = EngineRamp(final, 1, 1, False, 1, *ramp)
    sizes = BatchSizes(final, ramp)
    for consumed in range(2 * ramp[2] + 2):
        engine.update(consumed, consistency_check=True)
        assert sizes.at(consumed) == engine.get_current_global_batch_size(), consumed


@needs_ramp
@pytest.mark.parametrize(("final", "ramp"), RAMPS)
def test_a_length_in_samples_is_as_many_steps_as_the_engines_calculator_makes_of_it(
    final: int, ramp: tuple[int, int, int]
) -> None:
    engine = EngineRamp(final, 1, 1, False, 1, *ramp)
    training = TrainingConfig(
        train_samples=3 * ramp[2] + 5 * final + 1, global_batch_size=final, rampup_batch_size=ramp
    )
    taken: list[int] = []
    while True:
        engine.update(sum(taken), consistency_check=True)
        if sum(taken) + engine.get_current_global_batch_size() > training.train_samples:
            break
        taken.append(engine.get_current_global_batch_size())
    assert training.resolved_train_iters(final) == len(taken)
    assert training.resolved_train_samples(final) == sum(taken)
    sizes = training.batch_sizes(final)
    assert sizes.steps_of_ramp() == sum(size < final for size in taken) > 0
    for begun in range(len(taken)):
        assert sizes.samples_in(3, sum(taken[:begun])) >= sum(taken[begun : begun + 3])
        assert sizes.steps_in(sum(taken[begun:]), sum(taken[:begun])) == len(taken) - begun


SCHEDULE = ("0:4", "96:6", "160:2", "0.24K:8")
"""Thresholds in tokens; with 16 tokens per sequence they are 0, 6, 10 and 15 sequences."""


def test_the_schedule_of_megatrons_largest_example_is_read_in_sequences() -> None:
    words = ("0:16", "2.4B:320", "4.8B:624", "7.2B:928", "9.6B:1232", "12B:1536")
    assert read_schedule(words, 2048) == (
        (0, 16),
        (1171875, 320),
        (2343750, 624),
        (3515625, 928),
        (4687500, 1232),
        (5859375, 1536),
    )
    assert read_schedule((" ".join(words),), 2048) == read_schedule(words, 2048)
    converted = in_samples(words, 2048)
    assert converted[1] == "1171875samples:320"
    assert read_schedule(converted) == read_schedule(converted, 2048) == read_schedule(words, 2048)


def test_the_size_of_every_step_is_that_of_the_last_threshold_before_it() -> None:
    training = TrainingConfig(train_samples=41, step_batch_size_schedule=SCHEDULE).in_samples(16)
    final = training.resolved_global_batch_size(2)
    sizes = training.batch_sizes(final)
    assert final == 8
    taken: list[int] = []
    while sum(taken) + sizes.at(sum(taken)) <= 41:
        taken.append(sizes.at(sum(taken)))
    assert taken == [4, 4, 6, 2, 8, 8, 8]
    assert training.resolved_train_iters(final) == len(taken)
    assert training.resolved_train_samples(final) == sum(taken)
    assert sizes.steps_of_ramp() == 4
    assert sizes.sizes() == [4, 6, 2, 8]


def test_the_schedule_is_that_of_the_engines_calculator_where_it_has_one() -> None:
    calculator = getattr(num_microbatches_calculator, "StepBatchsizeNumMicroBatchesCalculator", None)
    if calculator is None:
        pytest.skip("megatron-core before 0.18 has no schedule")
    engine = calculator(1, 1, False, 1, " ".join(SCHEDULE), 16)
    sizes = BatchSizes(8, steps=read_schedule(SCHEDULE, 16))
    for consumed in range(30):
        engine.update(consumed, consistency_check=True)
        assert sizes.at(consumed) == engine.get_current_global_batch_size(), consumed
