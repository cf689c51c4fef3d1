"""Computes the figures that compare progressive training runs, from the data that `training_results` reads.

A run consists of phases; each phase trains one stack of layers, or all of them. The figures are:

    training time        the sum of the times of all steps
    step of a phase      the median time of its steps, because first steps and a busy machine give outliers. Steps with
                         and without cache hits have separate medians; the figure is their mean, weighted by step counts
    loss at equal time   the validation loss at the time at which the fastest run ended, interpolated linearly in
                         training time between two evaluations

Memory is the peak since the process began. This equals the peak of the phase only if each phase has its own process
(--exit-interval), or if memory grows from phase to phase.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from megatron_ext.progressive.growth.training_history import Finished
from megatron_ext.progressive.report.training_results import ProgressiveRun


@dataclass(frozen=True, kw_only=True)
class PhaseFigures:
    """Figures of one phase of a run; an unknown figure is None."""

    name: str
    """Name of the phase without its prefix: stack_0, ..., joint, end_to_end."""

    layers: int
    steps: int
    trainable_parameters: int
    frozen_parameters: int
    step_seconds: float | None
    """Seconds per step; see the top of this file."""

    first_epoch_step_seconds: float | None
    """Median seconds per step, over the steps without any hit in the activation cache."""

    cached_step_seconds: float | None
    """Median seconds per step, over the steps whose micro-batches were all in the activation cache."""

    peak_memory_bytes: int
    stack_bytes: list[int]
    """Bytes of the weights of every stack, by index."""

    stack_treatments: list[str]
    """Treatment of each stack in the phase, by index: one of `trunk_strategy.TREATMENTS`."""

    validation_loss: float | None
    """The last validation loss of the phase."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Figures of one run; a figure is None if it is unknown, or if there is no run to compare with."""

    name: str
    layers: int
    steps: int
    tokens: int | None
    training_seconds: float
    times_steps: bool
    """Whether step times were logged; if not, the training time is the wall time of the phases."""

    last_step_seconds: float | None
    """Seconds per step of the last phase; see the top of this file."""

    last_step_ratio: float | None
    """Ratio of `last_step_seconds` to the reference run's `last_step_seconds`."""

    cached_step_ratio: float | None
    """Ratio of the last phase's `cached_step_seconds` to the reference run's `last_step_seconds`."""

    peak_memory_bytes: int
    """Peak memory of the last phase."""

    peak_memory_ratio: float | None
    """Ratio of `peak_memory_bytes` to the reference run's `peak_memory_bytes`."""

    trainable_parameters: int
    """Number of trained parameters in the last phase."""

    validation_loss: float | None
    """The last validation loss."""

    equal_time_loss: float | None
    """Validation loss after `Comparison.equal_seconds` of training."""

    evaluation: dict[str, dict[str, float]]
    """Maps the name of each dataset to the figures that tools/evaluate.py has measured on it, by name."""

    phases: list[PhaseFigures]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The figures of all runs."""

    reference: str | None
    """Name of the run whose figures are the denominators of all ratios; None for no ratios."""

    equal_seconds: float | None
    """Training time of the fastest run; None unless at least two runs have step times and validation losses."""

    runs: list[RunFigures]


def compare_runs(runs: Sequence[ProgressiveRun], reference: str | None = None) -> Comparison:
    """Computes the figures of all runs, in order.

    Args:
        runs: the runs, with distinct names.
        reference: name of the run whose figures are the denominators of all ratios; None for no ratios.

    Raises:
        ValueError: the reference is not among the runs.
    """
    names = [run.name for run in runs]
    if reference is not None and reference not in names:
        raise ValueError(f"--reference {reference}: must be one of the --runs {', '.join(names)}")
    base = runs[names.index(reference)] if reference is not None else None
    seconds = equal_seconds(runs)
    return Comparison(
        reference=reference,
        equal_seconds=seconds,
        runs=[_run_figures(run, base, seconds) for run in runs],
    )


def equal_seconds(runs: Sequence[ProgressiveRun]) -> float | None:
    """Returns the shortest training time of the runs with step times and validation losses; None for fewer than two."""
    clocked = [run.training_seconds for run in runs if run.validation_by_seconds()[0]]
    return min(clocked) if len(clocked) > 1 else None


def loss_at(run: ProgressiveRun, seconds: float) -> float | None:
    """Returns the validation loss after `seconds` of training; None before the first or after the last evaluation."""
    times, losses = run.validation_by_seconds()
    if not times or not times[0] <= seconds <= times[-1] * (1 + 1e-9):
        return None
    return float(np.interp(seconds, times, losses))


def step_seconds(run: ProgressiveRun, phase: Finished, rate: float | None = None) -> float | None:
    """Returns the seconds per step of a phase; None if no step has the hit rate, or times were not logged.

    Args:
        run: the run that contains the phase.
        phase: the phase.
        rate: only steps with this hit rate of the activation cache count; None for all steps.
    """
    groups: dict[float | None, list[float]] = {}
    for step in range(phase.first_iteration + 1, phase.iteration + 1 if run.step_seconds else 0):
        found = run.hit_rate.get(step)
        if rate is None or found == rate:
            # Hit rates are means over a log interval. All steps with a rate between 0 and 1 form one group.
            key = found if found in (None, 0, 1) else 0.5
            groups.setdefault(key, []).append(run.step_seconds[step - 1])
    steps = sum(map(len, groups.values()))
    return sum(median(group) * len(group) for group in groups.values()) / steps if steps else None


def phase_figures(run: ProgressiveRun, phase: Finished) -> PhaseFigures:
    """Computes the figures of one phase."""
    return PhaseFigures(
        name=phase.name.removeprefix("progressive_"),
        layers=phase.layers,
        steps=phase.iteration - phase.first_iteration,
        trainable_parameters=phase.trainable_parameters,
        frozen_parameters=phase.frozen_parameters,
        step_seconds=step_seconds(run, phase),
        first_epoch_step_seconds=step_seconds(run, phase, rate=0),
        cached_step_seconds=step_seconds(run, phase, rate=1),
        peak_memory_bytes=phase.peak_memory_bytes,
        stack_bytes=phase.stack_bytes,
        stack_treatments=phase.stack_treatments,
        validation_loss=_last(run.validation, phase),
    )


def _run_figures(run: ProgressiveRun, base: ProgressiveRun | None, seconds: float | None) -> RunFigures:
    phases = [phase_figures(run, phase) for phase in run.phases]
    last = phases[-1]
    base_step = step_seconds(base, base.phases[-1]) if base is not None else None
    return RunFigures(
        name=run.name,
        layers=last.layers,
        steps=run.steps,
        tokens=None if run.tokens_per_step is None else round(run.steps * run.tokens_per_step),
        training_seconds=run.training_seconds,
        times_steps=bool(run.step_seconds),
        last_step_seconds=last.step_seconds,
        last_step_ratio=_ratio(last.step_seconds, base_step),
        cached_step_ratio=_ratio(last.cached_step_seconds, base_step),
        peak_memory_bytes=last.peak_memory_bytes,
        peak_memory_ratio=_ratio(
            last.peak_memory_bytes, None if base is None else base.phases[-1].peak_memory_bytes
        ),
        trainable_parameters=last.trainable_parameters,
        validation_loss=last.validation_loss,
        equal_time_loss=None if seconds is None else loss_at(run, seconds),
        evaluation={dataset: dict(figures) for dataset, figures in run.evaluation.items()},
        phases=phases,
    )


def _last(validation: Mapping[int, float], phase: Finished) -> float | None:
    within = [step for step in validation if phase.first_iteration < step <= phase.iteration]
    return validation[max(within)] if within else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
