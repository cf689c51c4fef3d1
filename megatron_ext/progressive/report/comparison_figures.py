"""The figures by which progressive trainings are compared, from what `results` has read.

    training time        the sum of all steps' times
    step of a phase      the median over its steps, as the first steps of a phase and a busy machine are outliers;
                         of steps with and without the activation cache the mean of both medians, by their numbers
    loss at equal time   the validation loss, between two evaluations linear in training time, at the moment at which
                         the quickest run had ended

Memory is a process's highest since it began: a phase shows its own only where each has its own process
(--exit-interval), or where memory grows from phase to phase.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from megatron_ext.progressive.growth.training_history import Finished
from megatron_ext.progressive.report.training_results import ProgressiveRun


@dataclass(frozen=True, kw_only=True)
class PhaseFigures:
    """One phase of one run; None where nothing tells."""

    name: str
    """Without the common beginning: stack_0, ..., joint, end_to_end."""

    layers: int
    steps: int
    trainable_parameters: int
    frozen_parameters: int
    step_seconds: float | None
    """See the module's text."""

    first_epoch_step_seconds: float | None
    """Median of the steps of which nothing was in the activation cache."""

    cached_step_seconds: float | None
    """Median of the steps of which everything was."""

    peak_memory_bytes: int
    stack_bytes: list[int]
    """By the stack's index."""

    stack_treatments: list[str]
    """The same: `plan.TREATMENTS`."""

    validation_loss: float | None
    """The last of the phase."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """One run; None where nothing tells, or nothing is there to compare with."""

    name: str
    layers: int
    steps: int
    tokens: int | None
    training_seconds: float
    times_steps: bool
    """False where steps' times were not logged, and the phases' wall time stands for them."""

    last_step_seconds: float | None
    """Of the last phase; see the module's text."""

    last_step_ratio: float | None
    """To the reference's."""

    cached_step_ratio: float | None
    """Of the last phase's steps of which everything was in the activation cache, to the reference's."""

    peak_memory_bytes: int
    """Of the last phase."""

    peak_memory_ratio: float | None
    """To the reference's."""

    trainable_parameters: int
    """In the last phase."""

    validation_loss: float | None
    """The last."""

    equal_time_loss: float | None
    """At `Comparison.equal_seconds`."""

    evaluation: dict[str, dict[str, float]]
    """Dataset -> figure -> value, of tools/evaluate.py."""

    phases: list[PhaseFigures]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs."""

    reference: str | None
    """Name of the run to which ratios are taken."""

    equal_seconds: float | None
    """Training time of the quickest run; None unless at least two have steps' times and validation losses."""

    runs: list[RunFigures]


def compare_runs(runs: Sequence[ProgressiveRun], reference: str | None = None) -> Comparison:
    """The figures of all runs, in their order.

    Args:
        runs: names differ.
        reference: name of the run to which ratios are taken; None for no ratios.

    Raises:
        ValueError: the reference is not among the runs.
    """
    names = [run.name for run in runs]
    if reference is not None and reference not in names:
        raise ValueError(f"--reference {reference}: no such run; --runs has {', '.join(names)}")
    base = runs[names.index(reference)] if reference is not None else None
    seconds = equal_seconds(runs)
    return Comparison(
        reference=reference,
        equal_seconds=seconds,
        runs=[_run_figures(run, base, seconds) for run in runs],
    )


def equal_seconds(runs: Sequence[ProgressiveRun]) -> float | None:
    """Training time of the quickest run; of those with steps' times and validation losses, if they are two or more."""
    clocked = [run.training_seconds for run in runs if run.validation_by_seconds()[0]]
    return min(clocked) if len(clocked) > 1 else None


def loss_at(run: ProgressiveRun, seconds: float) -> float | None:
    """Validation loss after so much training time; None before the first evaluation and after the last."""
    times, losses = run.validation_by_seconds()
    if not times or not times[0] <= seconds <= times[-1] * (1 + 1e-9):
        return None
    return float(np.interp(seconds, times, losses))


def step_seconds(run: ProgressiveRun, phase: Finished, rate: float | None = None) -> float | None:
    """Time of a phase's step; None where there is none, or times were not logged.

    Args:
        run: the phase's.
        phase: the phase.
        rate: only steps with this hit rate of the activation cache; None for all steps.
    """
    groups: dict[float | None, list[float]] = {}
    for step in range(phase.first_iteration + 1, phase.iteration + 1 if run.step_seconds else 0):
        found = run.hit_rate.get(step)
        if rate is None or found == rate:
            # What is in the cache by part is a group of its own: the interval in which an epoch ends.
            key = found if found in (None, 0, 1) else 0.5
            groups.setdefault(key, []).append(run.step_seconds[step - 1])
    steps = sum(map(len, groups.values()))
    return sum(median(group) * len(group) for group in groups.values()) / steps if steps else None


def phase_figures(run: ProgressiveRun, phase: Finished) -> PhaseFigures:
    """The figures of one phase."""
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
