"""Reads the results of a progressive training run: its phases, and the time and loss of its steps.

The results are read from these files in the directory of `--save`:

    {save}/progressive.json      the finished phases; required
    {save}/tensorboard/          the --tensorboard-dir of all phases and restarts; optional
    {save}/evaluation.json       the --output of tools/evaluate.py; optional

Steps of an unfinished phase are ignored. `comparison_figures` compares runs.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.progressive.growth.training_history import FILE, Finished, read_history
from megatron_ext.reports.events import Curve, read_curves
from megatron_ext.training.checkpoint.checkpoint_files import read_json

TENSORBOARD = "tensorboard"
EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class ProgressiveRun:
    """The results of one progressive training run."""

    name: str
    """Name of the run in the report."""

    rack: Rack
    """The stacks of the model in the last finished phase."""

    phases: tuple[Finished, ...]
    """The finished phases in order, at least one."""

    step_seconds: tuple[float, ...] = ()
    """Seconds of steps 1, 2, ..., without start-up, evaluation and checkpoints; empty if not logged."""

    losses: Mapping[int, float]
    """Training loss, by step."""

    validation: Mapping[int, float]
    """Validation loss, by step; at the last step of a phase the model is evaluated before it grows."""

    hit_rate: Mapping[int, float]
    """Maps each step to the hit rate of the activation cache in the step's log interval."""

    tokens_per_step: float | None = None
    """Training tokens per step; None if not logged."""

    evaluation: Mapping[str, Mapping[str, float]]
    """Maps the name of each dataset to the figures that tools/evaluate.py has measured on it, by name."""

    @property
    def steps(self) -> int:
        """Number of steps of all phases."""
        return self.phases[-1].iteration

    @property
    def training_seconds(self) -> float:
        """Seconds of all steps; if step times were not logged, the wall time of the phases."""
        return sum(self.step_seconds) or sum(phase.seconds for phase in self.phases)

    def validation_by_seconds(self) -> tuple[list[float], list[float]]:
        """Returns training seconds and validation loss of every evaluation; empty if step times were not logged."""
        if not self.step_seconds:
            return [], []
        clock = list(accumulate(self.step_seconds))
        return [clock[step - 1] for step in self.validation], list(self.validation.values())

    def validation_by_tokens(self) -> tuple[list[float], list[float]]:
        """Returns training tokens and validation loss of every evaluation; empty if tokens were not logged."""
        if self.tokens_per_step is None:
            return [], []
        return [step * self.tokens_per_step for step in self.validation], list(self.validation.values())


def read_run(name: str, directory: str | Path) -> ProgressiveRun:
    """Reads the --save directory of a progressive training run.

    Args:
        name: name of the run in tables and legends.
        directory: the `--save` directory; its files are listed at the top of this module.

    Raises:
        FileNotFoundError: the directory contains no progressive.json, or its subdirectory `tensorboard` no event files.
        ValueError: a file is damaged, or no phase is finished.
    """
    folder = Path(directory)
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"--runs {name}={directory}: contains no {FILE}; pass the --save directory of a progressive training run"
        )
    history = read_history(folder)
    phases = history.finished
    if not phases:
        raise ValueError(f"--runs {name}={directory}: no phase of this run is finished yet")
    curves = read_curves(folder / TENSORBOARD, flag="--runs") if (folder / TENSORBOARD).is_dir() else {}
    end = phases[-1].iteration
    found = {tag: _by_step(curve, end) for tag, curve in curves.items()}
    seconds = _every_step(found.get("iteration-time", {}), phases)
    tokens = [total / step for step, total in found.get("progressive/total_tokens", {}).items()]
    return ProgressiveRun(
        name=name,
        rack=history.rack.first(len(phases[-1].stack_bytes)),
        phases=phases,
        step_seconds=tuple(seconds.values()) if len(seconds) == end else (),
        losses=found.get("lm loss", {}),
        validation=found.get("lm loss validation", {}),
        hit_rate=_every_step(found.get("cache/hit_rate", {}), phases),
        tokens_per_step=tokens[-1] if tokens else None,
        evaluation=_read_evaluation(folder / EVALUATION),
    )


def _by_step(curve: Curve, last: int) -> dict[int, float]:
    """Returns the curve's values by step, in ascending order of the steps."""
    # If a run was restarted, a step may occur twice; the later value counts.
    values = dict(zip(*curve, strict=True))
    return {step: values[step] for step in sorted(values) if 0 < step <= last and math.isfinite(values[step])}


def _every_step(logged: Mapping[int, float], phases: Sequence[Finished]) -> dict[int, float]:
    """Maps every step to the value that was logged for its log interval; omits phases without logged values.

    If a plateau has ended a phase within a log interval, the phase's last steps get the last logged value.
    """
    values = {}
    for phase in phases:
        ends = [step for step in logged if phase.first_iteration < step <= phase.iteration]
        for step in range(phase.first_iteration + 1, phase.iteration + 1) if ends else ():
            values[step] = logged[ends[min(bisect_left(ends, step), len(ends) - 1)]]
    return values


def _read_evaluation(path: Path) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    try:
        return {
            dataset: {figure: float(value) for figure, value in figures.items()}
            for dataset, figures in read_json(path).items()
        }
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged, or was not written by tools/evaluate.py") from None
