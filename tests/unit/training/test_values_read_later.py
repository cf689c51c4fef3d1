"""The host reads a step's values during the next step: nothing that is reported, skipped or saved depends on when."""

import io
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, synthetic_batches
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.loop import EXIT_NOT_FINITE, EXIT_OK, Data, Loop
from tests.unit.training.test_training_step import make_stepper

STEPS, MICRO_BATCHES = 8, 4


def _batches(not_finite: tuple[int, ...], signalled: int | None = None) -> Iterator[Batch]:
    """Micro-batches with a NaN in some steps, and a signal to this process in one."""
    for place, batch in enumerate(synthetic_batches(TINY.seq_length)):
        step = place // MICRO_BATCHES + 1
        if step in not_finite:
            batch["loss_mask"][0, 0] = float("nan")
        if step == signalled and place % MICRO_BATCHES == 0:
            signal.raise_signal(signal.SIGTERM)
        yield batch


def _run(folder: Path, log_interval: int, *poison: Any) -> tuple[int, TrainingProgress, int, str]:
    """The exit code, the progress, the schedule's samples and what a run prints."""
    _, stepper = make_stepper(ParallelConfig())
    stream = io.StringIO()
    logging = LoggingConfig(
        log_interval=log_interval, tensorboard_dir=str(folder), device_peak_tflops=1.0, log_params_norm=True
    )
    stepper.log_params_norm = True
    with Reporter(logging, total_iterations=STEPS, stream=stream) as reporter:
        loop = Loop(
            TrainingConfig(train_iters=STEPS, max_consecutive_nan_steps=3, eval_iters=0),
            CheckpointConfig(),
            stepper,
            None,  # type: ignore[arg-type]  # nothing is saved
            reporter,
            Data(train=lambda _: _batches(*poison), valid=None, test=None),
            sequence_length=TINY.seq_length,
            flops_per_token=lambda _: 1.0,
        )
        code, progress = loop.run(TrainingProgress())
    return code, progress, stepper.scheduler.num_steps, stream.getvalue()


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    tags = ("lm loss", "grad-norm", "learning-rate", "params-norm")
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_curves_schedule_and_skipped_steps_do_not_depend_on_the_log_interval(tmp_path: Path) -> None:
    runs = {n: run_single(_run, tmp_path / str(n), n, (3, 5, 6)) for n in (1, 4, 100)}
    at_end = TrainingProgress(iteration=8, consumed_samples=32, skipped_steps=3)
    assert [run[:3] for run in runs.values()] == [(EXIT_OK, at_end, 5 * 4)] * 3
    curves = {n: _curves(tmp_path / str(n)) for n in runs}
    assert repr(curves[1]) == repr(curves[4]) == repr(curves[100])  # nan equals nan here
    rates = dict(curves[1]["learning-rate"])
    assert [step for step, _ in curves[1]["lm loss"]] == [1, 2, 4, 7, 8]
    assert rates[3] == rates[4] and rates[5] == rates[6] == rates[7] > rates[8]


@pytest.mark.parametrize("log_interval", [1, 100])
def test_a_diverged_run_stops_at_the_same_step_however_late_its_values_are_read(
    log_interval: int, tmp_path: Path
) -> None:
    code, progress, samples, printed = run_single(_run, tmp_path, log_interval, (4, 5, 6, 7))
    assert code == EXIT_NOT_FINITE
    assert (progress.iteration, progress.consumed_samples, progress.skipped_steps) == (6, 24, 3)
    assert samples == 3 * 4
    assert "stopped at step 6: the loss or gradient norm was not finite in 3 steps in a row" in printed


@pytest.mark.parametrize(("log_interval", "last"), [(1, 4), (100, 5)])
def test_a_signal_ends_the_run_after_its_step_or_after_the_next(
    log_interval: int, last: int, tmp_path: Path
) -> None:
    code, progress, samples, printed = run_single(_run, tmp_path, log_interval, (), 4)
    assert code == 143
    assert progress.iteration == last and samples == 4 * last
    assert f"stopped after step {last}: received SIGTERM, exit code 143" in printed
