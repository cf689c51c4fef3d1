"""`--manual-gc`: garbage is collected before the first step and at the interval, and at no other time of the run."""

import gc
from collections.abc import Iterator
from io import StringIO

import pytest

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, synthetic_batches
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.loop import Data, Loop
from tests.unit.training.test_training_step import make_stepper

_MICRO_BATCHES, _STEPS = 4, 6


def _collections(interval: int) -> list[int]:
    """The number of steps begun before each collection."""
    _, stepper = make_stepper(ParallelConfig())
    taken, found = [0], list[int]()

    def batches(_: int) -> Iterator[Batch]:
        for batch in synthetic_batches(TINY.seq_length):
            taken[0] += 1
            # Enough objects in cycles for many automatic collections.
            for _ in range(2000):
                cycle: list[object] = []
                cycle.append(cycle)
            yield batch

    def note(phase: str, _: dict[str, int]) -> None:
        # After its last step the run collects automatically again.
        if phase == "start" and (interval < 0 or not gc.isenabled()):
            found.append(-(-taken[0] // _MICRO_BATCHES))

    with Reporter(
        LoggingConfig(log_throughput=False), total_iterations=_STEPS, stream=StringIO()
    ) as reporter:
        loop = Loop(
            TrainingConfig(
                train_iters=_STEPS, eval_iters=0, manual_gc=interval >= 0, manual_gc_interval=max(0, interval)
            ),
            CheckpointConfig(),
            stepper,
            None,  # type: ignore[arg-type]  # nothing is saved
            reporter,
            Data(train=batches, valid=None, test=None),
            sequence_length=TINY.seq_length,
            flops_per_token=lambda _: 1.0,
        )
        gc.callbacks.append(note)
        try:
            loop.run(TrainingProgress())
        finally:
            gc.callbacks.remove(note)
    assert gc.isenabled()
    return found


@pytest.mark.parametrize(("interval", "steps"), [(0, [0]), (2, [0, 2, 4, 6])])
def test_garbage_is_collected_at_the_interval_only(interval: int, steps: list[int]) -> None:
    assert run_single(_collections, interval) == steps


def test_without_the_flag_python_collects_when_it_likes() -> None:
    assert len(run_single(_collections, -1)) > 4


def test_an_interval_requires_the_flag() -> None:
    with pytest.raises(ValueError, match="--manual-gc-interval 5: requires --manual-gc"):
        TrainingConfig(train_iters=1, manual_gc_interval=5)
