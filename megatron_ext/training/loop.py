"""The training loop: steps, evaluations, checkpoints, and the conditions under which a run ends.

Everything the loop calls is collective, so all ranks must take the same decisions. Each decision therefore uses values
that are equal on all ranks: losses, norms, clocks and signals are reduced during a step.

The host reads a step's values while the device computes the next step, so that the device never idles. If the values
are needed earlier (for a progress line, an evaluation, a save, or the end of the run), the host waits for them before
it starts the next step.
"""

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_ext.config.command_line.error_lines import tell_launcher
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.data.files.console import ProgressLines
from megatron_ext.platform.hosts import rank_progress
from megatron_ext.training.checkpoint.checkpointer import Checkpointer, TrainingProgress
from megatron_ext.training.engine.training_step import ReadStep, Stepper, StepResult, parameters_norm
from megatron_ext.training.garbage_collection import manual_collection
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.logging.reporter import Reporter
from megatron_ext.training.logging.step_metrics import StepMetrics
from megatron_ext.training.stop_signals import EXIT_CODES, NO_SIGNAL, SignalWatcher, ending_at_once

EXIT_OK = 0
"""The run is complete, or `--exit-interval` or `--exit-duration-in-mins` has stopped it."""

EXIT_NOT_FINITE = 3
"""`--max-consecutive-nan-steps` steps in a row had a loss or gradient norm that is not finite."""

Batches = Callable[[int], Iterator[Batch]]
"""Takes the number of consumed samples, and returns an endless iterator over the micro-batches that follow them."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The batches of a run."""

    train: Batches
    """Training batches."""

    valid: Batches | None
    """Validation batches, or None; every evaluation uses the same batches, so that evaluations can be compared."""

    test: Batches | None
    """Test batches, or None; evaluated once after the last step."""


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A started step."""

    progress: TrainingProgress
    """Progress after the step, except that the number of skipped steps may not be known yet."""

    read: ReadStep

    batch_size: int
    """Sequences in the step."""

    flops_per_token: float

    seconds: float
    """Seconds until the step was queued, including the host's wait for the previous step."""


@dataclass
class _Saving:
    """A save that runs while training continues."""

    progress: TrainingProgress
    started: float
    waited: float
    """Seconds for which training has waited for the save."""


class Loop:
    """Runs training steps until the run is complete or has to stop."""

    def __init__(
        self,
        training: TrainingConfig,
        checkpoint: CheckpointConfig,
        stepper: Stepper,
        checkpointer: Checkpointer,
        reporter: Reporter,
        data: Data,
        *,
        sequence_length: int,
        flops_per_token: Callable[[int], float],
        after_last_step: Callable[[TrainingProgress], None] = lambda progress: None,
        before_step: Callable[[int], None] = lambda iteration: None,
    ) -> None:
        """Args:
        training: settings of evaluation and of the run's length.
        checkpoint: settings of saving.
        stepper: runs the steps.
        checkpointer: saves checkpoints.
        reporter: reports the steps.
        data: the run's batches.
        sequence_length: tokens per sequence.
        flops_per_token: called with a step's number when the step has been queued; returns the step's model FLOPs per
            token (forward and backward, model families included), for throughput and MFU.
        after_last_step: called when the last step is done, before the final evaluation.
        before_step: called with the number of each step before the step begins.
        """
        self.training = training
        self.checkpoint = checkpoint
        self.stepper = stepper
        self.checkpointer = checkpointer
        self.reporter = reporter
        self.data = data
        self.sequence_length = sequence_length
        self.flops_per_token = flops_per_token
        self._after_last_step = after_last_step
        self._before_step = before_step
        self._has_noted_clipping = False
        self._saving: _Saving | None = None
        self.batch_sizes = training.batch_sizes(stepper.global_batch_size)
        self.total_iterations = training.resolved_train_iters(stepper.global_batch_size)
        self._unread: _Step | None = None
        self._last: StepResult | None = None
        self._not_finite_in_a_row = self._skipped_steps = 0

    def run(self, progress: TrainingProgress) -> tuple[int, TrainingProgress]:
        """Trains from `progress` until the run ends. Collective.

        Returns:
            The process's exit code (see `stop_signals` and the `EXIT_` constants) and the progress at the end.
        """
        if progress.iteration >= self.total_iterations:
            self._report_complete(progress)
        code, progress = self._train(progress)
        if self.is_complete(progress):
            self._after_last_step(progress)
        if code is None:
            self._evaluate_at_end(progress)
        return EXIT_OK if code is None else code, progress

    def _train(self, progress: TrainingProgress) -> tuple[int | None, TrainingProgress]:
        """Runs the steps; returns the exit code (None if the run is complete) and the progress."""
        self._skipped_steps = progress.skipped_steps
        collection = manual_collection() if self.training.manual_gc else nullcontext()
        with SignalWatcher() as signals, self._running_save(), collection:
            batches = self.data.train(progress.consumed_samples)
            shared = partial(self._shared, signals, time.monotonic())
            while not self.is_complete(progress):
                progress = self._advance(progress, batches, shared)
                self._proceed_with_save(wait=False)
                if self._is_due(progress.iteration, self.training.manual_gc_interval or None):
                    gc.collect()
                if self._is_diverged:
                    self._note_stop(
                        f"stopped at step {progress.iteration}: the loss or gradient norm was not finite in "
                        f"{self._not_finite_in_a_row} steps in a row; no checkpoint of these steps was saved",
                        EXIT_NOT_FINITE,
                    )
                    return EXIT_NOT_FINITE, progress
                if self._is_due(progress.iteration, self.training.eval_interval):
                    self._evaluate(progress)
                reason, code = self._reason_to_stop(progress)
                due = self._is_due(progress.iteration, self.checkpoint.save_interval)
                is_last = reason is not None or self.is_complete(progress)
                if due or is_last:
                    self._save(progress, is_last=is_last)
                if reason is not None:
                    self._note_stop(f"stopped after step {progress.iteration}: {reason}", code)
                    return code, progress
        return None, progress

    def _shared(self, signals: SignalWatcher, started: float) -> torch.Tensor:
        limit = self.training.exit_duration_in_mins
        return signals.shared(time_is_left=limit is None or time.monotonic() - started <= 60 * limit)

    def is_complete(self, progress: TrainingProgress) -> bool:
        """Returns whether the last step is done, or a model family ends the run early."""
        enough = any(family.is_complete() for family in self.stepper.families)
        return enough or progress.iteration >= self.total_iterations

    def evaluate_only(self, progress: TrainingProgress) -> int:
        """Evaluates the loaded model on validation and test data (`--skip-train`); returns the exit code."""
        self._evaluate_at_end(progress)
        return EXIT_OK

    def _advance(
        self, progress: TrainingProgress, batches: Iterator[Batch], shared: Callable[[], torch.Tensor]
    ) -> TrainingProgress:
        """Starts a step and finishes the previous one; finishes this step, too, if its values are needed now.

        Returns:
            The progress after this step; after too many non-finite steps, the progress after the last of these.
        """
        step = self._start(progress, batches, shared)
        before, self._unread = self._unread, step
        if before is not None:
            progress = self._finish(before)
            if self._is_diverged:
                return progress  # the new step is dropped, as if it had not been started
        if self._needs_values(step.progress):
            self._unread = None
            return self._finish(step)
        return step.progress

    def _start(
        self, progress: TrainingProgress, batches: Iterator[Batch], shared: Callable[[], torch.Tensor]
    ) -> _Step:
        iteration = progress.iteration + 1
        rank_progress.reach(iteration)
        self._before_step(iteration)
        started = time.perf_counter()
        batch_size = self.batch_sizes.at(progress.consumed_samples)
        read = self.stepper.start(batches, iteration, shared, batch_size=batch_size)
        consumed = progress.consumed_samples + batch_size
        return _Step(
            progress=replace(progress, iteration=iteration, consumed_samples=consumed),
            read=read,
            batch_size=batch_size,
            flops_per_token=self.flops_per_token(iteration),
            seconds=time.perf_counter() - started,
        )

    def _needs_values(self, progress: TrainingProgress) -> bool:
        """Returns whether the last started step must be finished before the next one starts."""
        iteration = progress.iteration
        intervals = (self.training.eval_interval, self.checkpoint.save_interval)
        return (
            self._last is None  # after the first step, all ranks exchange the names of the layers' values
            or self.reporter.ends_interval(iteration)
            or any(self._is_due(iteration, interval) for interval in intervals)
            or any(family.needs_values(iteration) for family in self.stepper.families)
            or self._reason_to_stop(progress)[0] is not None
            or self.is_complete(progress)
        )

    def _finish(self, step: _Step) -> TrainingProgress:
        """Reads and reports the results of a started step; returns the progress after it."""
        began = time.perf_counter()
        result = self._last = step.read()
        seconds = step.seconds + time.perf_counter() - began
        if not result.is_overflow:
            self._not_finite_in_a_row = self._not_finite_in_a_row + 1 if result.skipped else 0
        self._skipped_steps += int(result.skipped)
        progress = replace(step.progress, skipped_steps=self._skipped_steps)
        iteration = progress.iteration
        self.reporter.step(iteration, self._metrics(result, progress, step, seconds))
        if result.statistics:
            self.reporter.statistics(iteration, result.statistics)
        self._note_clipping(result.grad_norm)
        self._report_messages(iteration, {**result.losses, **result.layer_losses})
        return progress

    def _note_clipping(self, norm: float) -> None:
        """Reports once that clipping couples layers that would otherwise train independently."""
        limit = self.stepper.clip_grad
        apart = any(family.trains_apart() for family in self.stepper.families)
        if apart and 0 < limit < norm and not self._has_noted_clipping:
            self._has_noted_clipping = True
            self.reporter.message(
                f"note: the gradient norm {norm:.3g} exceeds --clip-grad {limit:g}; clipping scales "
                "the gradients of all layers together, so the layers do not train independently in such steps"
            )

    @property
    def _is_diverged(self) -> bool:
        return self._not_finite_in_a_row >= self.training.max_consecutive_nan_steps

    def _report_complete(self, progress: TrainingProgress) -> None:
        """Reports that there is no step left, and how to continue."""
        scheduler = self.stepper.scheduler
        text = (
            f"training is already complete: step {progress.iteration} of {self.total_iterations}; to continue, "
            "increase --train-iters (--max-steps)"
        )
        # Without one of these flags, loading refuses a longer schedule.
        if not (scheduler.override_opt_param_scheduler or scheduler.use_checkpoint_opt_param_scheduler):
            text += ", with --override-opt-param-scheduler if that makes the learning-rate schedule longer"
        self.reporter.message(text)

    def _note_stop(self, text: str, code: int) -> None:
        """Reports why the run ends before its last step."""
        self.reporter.message(text)
        if code != EXIT_OK:
            tell_launcher(text)  # otherwise the launcher's failure report would give no reason

    def _report_messages(self, iteration: int, values: dict[str, float]) -> None:
        families = self.stepper.families
        for family in families:
            for message in family.after_step(self.stepper.models, families, iteration, values):
                if message.tag is None:
                    self.reporter.message(message.text)
                else:
                    self.reporter.text(message.tag, message.text, iteration)

    def _metrics(
        self, result: StepResult, progress: TrainingProgress, step: _Step, seconds: float
    ) -> StepMetrics:
        return StepMetrics(
            losses={**result.losses, **result.layer_losses},
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            batch_size=step.batch_size,
            tokens=step.batch_size * self.sequence_length,
            consumed_samples=progress.consumed_samples,
            seconds=seconds,
            flops_per_token=step.flops_per_token,
            skipped=result.skipped,
            params_norm=result.params_norm,
            loss_scale=result.loss_scale,
            num_zeros=result.num_zeros,
        )

    def _reason_to_stop(self, progress: TrainingProgress) -> tuple[str | None, int]:
        """Returns why the run stops after this step (None to continue) and the exit code; equal on every rank."""
        signal_or_none, time_is_left = self._last.shared if self._last is not None else (NO_SIGNAL, True)
        if signal_or_none != NO_SIGNAL:
            received = signal.Signals(int(-signal_or_none))
            code = EXIT_CODES[received]
            return f"received {received.name}, exit code {code}", code
        if not time_is_left:
            return f"--exit-duration-in-mins {self.training.exit_duration_in_mins}", EXIT_OK
        if self._is_due(progress.iteration, self.training.exit_interval):
            return f"--exit-interval {self.training.exit_interval}", EXIT_OK
        return None, EXIT_OK

    def _save(self, progress: TrainingProgress, *, is_last: bool) -> None:
        # A skipped step has changed nothing, but the parameters may already have been non-finite before it.
        skipped = self._last is not None and self._last.skipped
        if self.checkpoint.save is None or (
            skipped and not math.isfinite(parameters_norm(self.stepper.models))
        ):
            return
        self._proceed_with_save(wait=True)
        started = time.perf_counter()
        if self.checkpoint.async_save and not is_last:
            self.checkpointer.begin_save(progress)
            self._saving = _Saving(progress, started, time.perf_counter() - started)
            return
        path = self.checkpointer.save(progress)
        self.reporter.message(
            f"saved step {progress.iteration} to {path} in {time.perf_counter() - started:.1f} s"
        )

    def _proceed_with_save(self, *, wait: bool) -> None:
        """Advances a save that runs while training continues, and reports it once it is complete.

        With `wait`, the save is complete when this method returns.
        """
        if self._saving is None:
            return
        started = time.perf_counter()
        complete = self.checkpointer.proceed_with_save(wait=wait)
        self._saving.waited += time.perf_counter() - started
        if complete:
            saved, self._saving = self._saving, None
            self.reporter.message(
                f"saved step {saved.progress.iteration} to {self.checkpointer.path(saved.progress)} in "
                f"{time.perf_counter() - saved.started:.1f} s (--async-save: training waited {saved.waited:.1f} s)"
            )

    @contextmanager
    def _running_save(self) -> Iterator[None]:
        """Context manager around training: at the end, waits for a save that still runs; after an error, cancels the
        save.
        """
        try:
            yield
        except BaseException:
            self.checkpointer.give_up_save()
            raise
        self._proceed_with_save(wait=True)

    def _evaluate(self, progress: TrainingProgress) -> None:
        if self.data.valid is not None and self.training.eval_iters > 0:
            self._report(progress, self.data.valid, "validation")

    def _evaluate_at_end(self, progress: TrainingProgress) -> None:
        # A run that was already complete is evaluated again, because it may have been killed after its last save.
        if self.training.eval_iters == 0:
            return
        evaluated = (
            self._is_due(progress.iteration, self.training.eval_interval) and not self.training.skip_train
        )
        due = {"validation": None if evaluated else self.data.valid, "test": self.data.test}
        remaining = {name: batches for name, batches in due.items() if batches is not None}
        if remaining:
            steps = f"{self.training.eval_iters} step{'s' if self.training.eval_iters > 1 else ''}"
            self.reporter.message(
                f"evaluating on {' and '.join(remaining)} data, {steps} each (--eval-iters)"
            )
        saved = f"; step {progress.iteration} is saved" if self.checkpoint.save is not None else ""
        with ending_at_once(f"stopped in the evaluation{saved}"):
            for name, batches in remaining.items():
                self._report(progress, batches, name)

    def _report(self, progress: TrainingProgress, batches: Batches, split: str) -> None:
        self.reporter.validation(
            progress.iteration,
            self.stepper.evaluate(lambda: batches(0), self.training.eval_iters, split, self._progress_lines),
            consumed_samples=progress.consumed_samples,
            split=split,
        )

    def _progress_lines(self, name: str) -> Callable[[int], None]:
        total = self.training.eval_iters
        return ProgressLines(name, total, unit="steps", write=self.reporter.message).advance

    @staticmethod
    def _is_due(iteration: int, interval: int | None) -> bool:
        return interval is not None and iteration % interval == 0
