"""The end of a run: its result is written before the final evaluation, which shows progress and can be stopped."""

import contextlib
import io
import signal
from collections.abc import Iterator
from unittest import mock

import pytest

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.data.files import console
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, synthetic_batches
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.loop import Data, Loop
from tests.unit.training.test_training_step import make_stepper

STEPS, EVAL_STEPS, MICRO_BATCHES = 2, 3, 4


def _batches(signalled: int | None) -> Iterator[Batch]:
    """Validation batches, with a signal to this process in one."""
    for place, batch in enumerate(synthetic_batches(TINY.seq_length)):
        if place == signalled:
            signal.raise_signal(signal.SIGTERM)
        yield batch


def _run(signalled: int | None) -> tuple[int, str, list[str]]:
    """The exit code, what a run prints, and what it has printed when the last step was done."""
    _, stepper = make_stepper(ParallelConfig())
    stream, after = io.StringIO(), list[str]()
    logging = LoggingConfig(log_interval=1, device_peak_tflops=1.0)
    with (
        contextlib.redirect_stdout(stream),
        mock.patch.object(console, "_LINE_SECONDS", 0.0),
        Reporter(logging, total_iterations=STEPS, stream=stream) as reporter,
    ):
        loop = Loop(
            TrainingConfig(train_iters=STEPS, eval_iters=EVAL_STEPS),
            CheckpointConfig(),
            stepper,
            None,  # type: ignore[arg-type]  # nothing is saved
            reporter,
            Data(
                train=lambda _: synthetic_batches(TINY.seq_length),
                valid=lambda _: _batches(signalled),
                test=None,
            ),
            sequence_length=TINY.seq_length,
            flops_per_token=lambda _: 1.0,
            after_last_step=lambda progress: after.append(f"{progress.iteration}\n{stream.getvalue()}"),
        )
        try:
            code = loop.run(TrainingProgress())[0]
        except SystemExit as ended:
            code = int(str(ended.code))
    return code, stream.getvalue(), after


def test_the_final_evaluation_shows_progress_and_follows_what_is_done_after_the_last_step() -> None:
    code, printed, (before,) = run_single(_run, None)
    assert code == 0
    assert before.startswith("2\n") and "step 2/2" in before and "evaluating on" not in before
    for step in range(1, EVAL_STEPS + 1):
        assert f"validation: {step} of {EVAL_STEPS} steps (" in printed
    assert printed.splitlines()[-1].startswith("validation at step 2 | lm loss ")


@pytest.mark.parametrize("signalled", [MICRO_BATCHES])
def test_a_signal_in_the_final_evaluation_ends_the_process_at_once_with_its_code(signalled: int) -> None:
    code, printed, after = run_single(_run, signalled)
    assert code == 128 + signal.SIGTERM and len(after) == 1
    assert printed.splitlines()[-1] == "stopped in the evaluation"
    assert f"validation: 1 of {EVAL_STEPS} steps" in printed
