"""Reports a run's progress on the screen, in TensorBoard and in W&B. Only rank 0 writes.

The training loop makes these calls on every rank; they are not collective, and only rank 0's arguments are used:

    reporter.step(iteration, StepMetrics(...))          after every optimizer step
    reporter.statistics(iteration, {tag: value})        the families' statistics
    reporter.validation(iteration, {"lm loss": 2.3}, consumed_samples=...)
    reporter.message("saved step 100 to ...")
    reporter.close()                                    or use it as a context manager, which also closes after errors

TensorBoard's tags are Megatron-LM's: `lm loss`, `learning-rate`, `grad-norm`, `params-norm`, `batch-size`,
`iteration-time`, `throughput` (TFLOP/s per device), `mem-allocated-bytes`, ..., `lm loss validation`,
`lm loss validation ppl`. Further tags are `tokens-per-second`, `mfu`, `skipped-iterations`, `nan-iterations`.
Curves show the values of individual steps; printed losses, speed and MFU are means over the log interval.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO
from weakref import WeakSet

from megatron_ext.config.groups.logging_config import LoggingConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.platform import process_groups
from megatron_ext.platform.device_memory import memory_use
from megatron_ext.platform.peak_rate import DevicePeak, device_peak
from megatron_ext.reports.scalar_charts import ScalarChart
from megatron_ext.training.logging.progress_line import Fields, binary_size, clock, compact, open_progress
from megatron_ext.training.logging.step_metrics import Interval, StepMetrics
from megatron_ext.training.logging.tensorboard_writer import TensorBoard
from megatron_ext.training.logging.wandb_run import WandbRun, check_wandb

_LARGEST_EXPONENT = 20.0
"""Losses are capped at this value before the perplexity is computed, as in Megatron-LM. Otherwise the high values of
the first steps would flatten the rest of the curve.
"""

_WITH_BASELINE: WeakSet[TextIO] = WeakSet()
"""Streams on which the MFU baseline has already been printed; the phases of a run share a stream and a baseline."""


class Reporter:
    """Reports the progress of one run: prints it, and writes it to TensorBoard and W&B.

    Every rank must create a reporter, because all ranks take part in measuring the peak rate of an unknown device.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        *,
        total_iterations: int,
        charts: Sequence[ScalarChart] = (),
        precision: Precision = "fp32",
        shows_batch_size: bool = False,
        iteration: int = 0,
        consumed_samples: int = 0,
        configuration: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """Opens the outputs on rank 0.

        Args:
            logging: the logging flags.
            total_iterations: optimizer steps of the whole run.
            charts: the model families' charts for TensorBoard's Custom Scalars page.
            precision: the run's precision, on which the device's peak rate depends.
            shows_batch_size: whether the progress line shows the batch size; useful if it changes during the run.
            iteration: number of the last step before this run; 0 for a new run.
            consumed_samples: sequences consumed before this run.
            configuration: the config groups by name, as dataclasses or JSON values; written to TensorBoard and W&B.
            rank: this process's rank; None for the rank that `torchrun` sets.
            world_size: number of processes; None for the number that `torchrun` sets.
            stream: output stream for progress; None for standard output.

        Raises:
            ValueError: the TensorBoard directory cannot be written, or W&B is requested but not installed.
        """
        check_wandb(logging)
        self._logging = logging
        self._total = total_iterations
        self._devices = process_groups.world_size() if world_size is None else world_size
        self._peak: DevicePeak | None = None
        if logging.log_throughput:
            self._peak = device_peak(precision, logging.device_peak_tflops)
        self._shows_batch_size = shows_batch_size
        self._interval = Interval()
        self._skipped = self._nan = 0
        self._is_silent = (process_groups.rank() if rank is None else rank) != 0
        if self._is_silent:
            return
        texts = {name: _json_values(value) for name, value in (configuration or {}).items()}
        self._tensorboard = _open_tensorboard(logging, charts, iteration, consumed_samples, texts)
        self._wandb = WandbRun(logging, texts) if logging.wandb_project is not None else None
        stream = stream or sys.stdout
        self._progress = open_progress(stream, total_iterations, iteration)
        # In a process without standard output, such as a service, the stream is None.
        if self._peak is not None and stream is not None and stream not in _WITH_BASELINE:
            _WITH_BASELINE.add(stream)
            rate = f"{self._peak.flops_per_second / 1e12:.4g} TFLOP/s per process ({self._peak.source})"
            self.message(f"MFU baseline: {rate}")

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def step(self, iteration: int, metrics: StepMetrics) -> None:
        """Reports one optimizer step; must be called for every step, in order."""
        if self._is_silent:
            return
        self._interval.add(metrics)
        self._skipped += metrics.skipped
        self._nan += metrics.has_nan
        if iteration % self._logging.tensorboard_log_interval == 0:
            self._write_step(iteration, metrics)
        interval_ends = self.ends_interval(iteration)
        if interval_ends:
            self._raise_peak()
        self._progress.update(iteration, self._fields(iteration, metrics), interval_ends)
        if interval_ends:
            self._write_interval(iteration, metrics.consumed_samples)
            self._interval = Interval()
            self._flush()

    def ends_interval(self, iteration: int) -> bool:
        """Returns whether a step is the last of a log interval; equal on every rank."""
        return iteration % self._logging.log_interval == 0 or iteration == self._total

    def validation(
        self, iteration: int, losses: Mapping[str, float], *, consumed_samples: int, split: str = "validation"
    ) -> None:
        """Reports the result of an evaluation.

        Args:
            iteration: steps done so far.
            losses: mean losses by name. Names with `/` belong to a layer: they get no perplexity, and only ratios
                (`..._ratio`) and accuracies among them are printed.
            consumed_samples: sequences consumed in training so far.
            split: `validation` or `test`; part of the tags.
        """
        if self._is_silent:
            return
        shown = []
        for name, loss in losses.items():
            self._scalar(f"{name} {split}", loss, iteration, consumed_samples)
            if name.endswith(("_ratio", "_accuracy")):
                shown.append(f"{name.rpartition('/')[2].replace('_', ' ')} {loss:.4f}")
            if "/" in name:
                continue
            perplexity = math.exp(min(loss, _LARGEST_EXPONENT))  # with this order of arguments, nan stays nan
            shown.append(f"{name} {loss:.6f} | ppl {perplexity:.4f}")
            if self._logging.log_validation_ppl:
                self._scalar(f"{name} {split} ppl", perplexity, iteration, consumed_samples)
        self.message(" | ".join([f"{split} at step {iteration}", *shown]))
        self._flush()

    def statistics(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes a model family's statistics (tag -> value) to TensorBoard and W&B; prints nothing."""
        if self._is_silent:
            return
        for tag, value in values.items():
            self._scalar(tag, value, iteration)
        self._flush()

    def text(self, tag: str, text: str, iteration: int) -> None:
        """Writes a Markdown text to TensorBoard."""
        if not self._is_silent and self._tensorboard is not None:
            self._tensorboard.text(tag, text, iteration)

    def message(self, text: str) -> None:
        """Prints a line, on rank 0 only."""
        if not self._is_silent:
            self._progress.message(text)

    def close(self) -> None:
        """Ends the progress display and closes the files; safe to call twice."""
        if self._is_silent:
            return
        self._is_silent = True
        self._progress.close()
        for output in (self._tensorboard, self._wandb):
            if output is not None:
                output.close()

    def _fields(self, iteration: int, metrics: StepMetrics) -> Fields:
        interval = self._interval
        # Values of layers (names with `/`) appear in TensorBoard only; there are too many for a line.
        fields = {name: f"{loss:.4f}" for name, loss in interval.losses.items() if "/" not in name}
        fields["lr"] = f"{metrics.learning_rate:.3e}"
        if self._shows_batch_size:
            fields["batch size"] = str(metrics.batch_size)
        if metrics.grad_norm is not None:
            fields["grad norm"] = f"{metrics.grad_norm:.3f}"
        if metrics.params_norm is not None:
            fields["params norm"] = f"{metrics.params_norm:.3f}"
        if metrics.num_zeros is not None:
            fields["num zeros"] = f"{metrics.num_zeros:.0f}"
        if metrics.loss_scale is not None:
            fields["loss scale"] = f"{metrics.loss_scale:.6g}"
        fields["ms/step"] = f"{1e3 * interval.seconds_per_step:.1f}"
        if self._peak is not None:
            fields["tokens/s"] = compact(interval.tokens_per_second)
            fields["MFU"] = f"{100 * self._mfu():.1f}%" + (" (above the baseline)" if self._mfu() > 1 else "")
        fields["memory"] = binary_size(memory_use().peak)
        if self._skipped:
            fields["skipped"] = str(self._skipped)
        fields["ETA"] = clock((self._total - iteration) * interval.seconds_per_step)
        return fields

    def _raise_peak(self) -> None:
        if self._peak is None:
            return
        # A peak that was measured on a busy machine is too low, so that MFU would exceed 100 %.
        peak = self._peak.raised(self._flops_per_second_per_device())
        if peak is not self._peak:
            was, self._peak = self._peak, peak
            self.message(
                f"MFU baseline: {peak.flops_per_second / 1e12:.4g} TFLOP/s per process from now on, "
                "because the run is "
                f"faster than the {was.flops_per_second / 1e12:.4g} measured at its start, when the machine was busy"
            )

    def _mfu(self) -> float:
        assert self._peak is not None
        return self._flops_per_second_per_device() / self._peak.flops_per_second

    def _flops_per_second_per_device(self) -> float:
        return self._interval.flops_per_second / self._devices

    def _write_step(self, iteration: int, metrics: StepMetrics) -> None:
        values = {"learning-rate": metrics.learning_rate, "batch-size": float(metrics.batch_size)}
        if not metrics.skipped:
            values |= metrics.losses
        if metrics.grad_norm is not None:
            values["grad-norm"] = metrics.grad_norm
        if metrics.params_norm is not None:
            values["params-norm"] = metrics.params_norm
        if metrics.num_zeros is not None:
            values["num-zeros"] = metrics.num_zeros
        if metrics.loss_scale is not None:
            values["loss-scale"] = metrics.loss_scale
        for tag, value in values.items():
            self._scalar(tag, value, iteration, metrics.consumed_samples)

    def _write_interval(self, iteration: int, consumed_samples: int) -> None:
        values = {
            "iteration-time": self._interval.seconds_per_step,
            "consumed-samples": float(consumed_samples),
        }
        if self._peak is not None:
            values["throughput"] = self._flops_per_second_per_device() / 1e12
            values["tokens-per-second"] = self._interval.tokens_per_second
            values["mfu"] = self._mfu()
        if self._logging.log_memory:
            memory = memory_use()
            values["mem-allocated-bytes"] = float(memory.current)
            values["mem-max-allocated-bytes"] = float(memory.peak)
            values["mem-reserved-bytes"] = float(memory.reserved)
        values["skipped-iterations"] = float(self._skipped)
        values["nan-iterations"] = float(self._nan)
        for tag, value in values.items():
            self._scalar(tag, value, iteration)

    def _scalar(self, tag: str, value: float, iteration: int, consumed_samples: int | None = None) -> None:
        if self._tensorboard is not None:
            self._tensorboard.scalar(tag, value, iteration, consumed_samples)
        if self._wandb is not None:
            self._wandb.scalar(tag, value, iteration)

    def _flush(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.flush()


def _open_tensorboard(
    logging: LoggingConfig,
    charts: Sequence[ScalarChart],
    iteration: int,
    consumed_samples: int,
    texts: Mapping[str, Any],
) -> TensorBoard | None:
    if logging.tensorboard_dir is None:
        return None
    tensorboard = TensorBoard(
        logging.tensorboard_dir, charts=charts, iteration=iteration, consumed_samples=consumed_samples
    )
    for name, values in texts.items():
        tensorboard.text(f"configuration/{name}", f"```json\n{json.dumps(values, indent=2)}\n```", iteration)
    return tensorboard


def _json_values(value: Any) -> Any:
    """Converts a configuration to JSON values; a value of an unknown type becomes its `str`."""
    is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
    plain = dataclasses.asdict(value) if is_config else value
    return json.loads(json.dumps(plain, default=str))
