"""Compares progressive training runs in two tables, and in an HTML page with a timeline of each run's growth.

In a timeline, every stack (layers that are trained together) is a rectangle that begins when the stack is created.
Layer 0 is next to the embedding, and a prepended stack shifts the others up. The colour shows whether the stack is
trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.progressive.report.comparison_figures import Comparison, PhaseFigures, RunFigures
from megatron_ext.progressive.report.training_results import ProgressiveRun
from megatron_ext.reports.charts import bar_chart, curves_chart
from megatron_ext.reports.events import Curve
from megatron_ext.reports.page import Page
from megatron_ext.reports.timeline import Block, Kind, timeline_chart

Cell = str | int | float | None

_MEBI = 2**20
_KINDS = {
    "trained": Kind(name="trained", colour="#0072B2", text_colour="white"),
    "adapters": Kind(name="only adapters trained", colour="#E69F00", text_colour="black"),
    "frozen": Kind(name="frozen", colour="#A8A8A8", text_colour="black"),
    "cached": Kind(name="frozen, activations cached", colour="#DADADA", text_colour="black"),
}
_HELD_OUT = {
    "loss": "held-out loss",
    "unigram_cross_entropy": "unigram baseline",
    "masked_token_accuracy": "masked-token accuracy",
    "unigram_accuracy": "unigram guess",
}
"""Maps figures of tools/evaluate.py to column titles; the other figures can be computed from these."""

_NOT_NOTED = Kind(name="not recorded", colour="#F6F0D8", text_colour="black")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table that is printed and shown on the page."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


def runs_table(comparison: Comparison) -> Table:
    """Returns a table with one row per run, without columns that are empty for all runs."""
    moment = comparison.equal_seconds
    datasets = list(dict.fromkeys(dataset for run in comparison.runs for dataset in run.evaluation))
    rows = []
    for run in comparison.runs:
        cells: dict[str, Cell] = {
            "run": run.name,
            "layers": run.layers,
            "steps": run.steps,
            "tokens": run.tokens,
            "training, s": _short(run.training_seconds),
            "step of the last phase, ms": _scaled(run.last_step_seconds, 1e3),
            f"step / {comparison.reference}": run.last_step_ratio,
            f"cached step / {comparison.reference}": run.cached_step_ratio,
            "peak memory, MiB": _scaled(run.peak_memory_bytes, 1 / _MEBI),
            f"memory / {comparison.reference}": run.peak_memory_ratio,
            "trained parameters at the end": run.trainable_parameters,
            "validation loss": run.validation_loss,
            f"validation loss after {moment or 0:.4g} s": run.equal_time_loss,
        }
        for dataset in datasets:
            where = f" ({dataset})" if len(datasets) > 1 else ""
            for figure, label in _HELD_OUT.items():
                cells[f"{label}{where}"] = run.evaluation.get(dataset, {}).get(figure)
        rows.append(cells)
    return _table("Runs", rows)


def phases_table(comparison: Comparison) -> Table:
    """Returns a table with one row per run and phase, without columns that are empty for all phases."""
    return _table("Phases", [_phase_cells(run, phase) for run in comparison.runs for phase in run.phases])


def _phase_cells(run: RunFigures, phase: PhaseFigures) -> dict[str, Cell]:
    weights = " + ".join(f"{size / _MEBI:.3g}" for size in phase.stack_bytes)
    return {
        "run": run.name,
        "phase": _title(phase.name),
        "layers": phase.layers,
        "steps": phase.steps,
        "trained": phase.trainable_parameters,
        "frozen": phase.frozen_parameters,
        "step, ms": _scaled(phase.step_seconds, 1e3),
        "first epoch, ms": _scaled(phase.first_epoch_step_seconds, 1e3),
        "from the cache, ms": _scaled(phase.cached_step_seconds, 1e3),
        "peak memory, MiB": _scaled(phase.peak_memory_bytes, 1 / _MEBI),
        "stacks, MiB": weights,
        "validation loss": phase.validation_loss,
    }


def messages(comparison: Comparison) -> list[str]:
    """Returns sentences that explain the tables."""
    found = [
        "The time of a step is the median over a phase. If only some steps read the activation cache, it is the mean "
        "of two medians, with and without the cache, weighted by the numbers of steps. Training time is the sum over "
        "all steps, without start-up, evaluation and checkpoints. Peak memory is the peak since the process began."
    ]
    if comparison.equal_seconds is not None:
        found.append(
            f"The fastest run trained for {comparison.equal_seconds:.4g} s. The validation losses of the other runs "
            "after this time are interpolated between two evaluations."
        )
    unclocked = [run.name for run in comparison.runs if not run.times_steps]
    if unclocked:
        found.append(
            f"Step times were not logged by {', '.join(unclocked)}; their training time is the wall time of the "
            "phases, including start-up, evaluation and checkpoints."
        )
    found.append(
        "Losses on masked tokens cannot be compared if the mask fractions (time steps) differ, because "
        "the tasks then differ."
    )
    return found


def report_page(runs: Sequence[ProgressiveRun], comparison: Comparison) -> str:
    """Returns the comparison as an HTML page.

    Args:
        runs: the data of the runs.
        comparison: the figures of the same runs.
    """
    page = Page("Progressive training")
    for table in (runs_table(comparison), phases_table(comparison)):
        page.heading(table.title)
        page.table(table.columns, table.rows)
    for message in messages(comparison):
        page.paragraph(message)
    for run, figures in zip(runs, comparison.runs, strict=True):
        page.heading(f"Growth: {run.name}")
        page.pictures([(growth_timeline(run), _TIMELINE_CAPTION)])
        page.pictures(_phase_charts(figures))
    charts = _loss_charts(runs)
    if charts:
        page.heading("All runs")
        page.pictures(charts)
    return page.html()


_TIMELINE_CAPTION = (
    "Layers over steps, with layer 0 next to the embedding: the trained stacks in each phase, and the "
    "precision of each stack. Below, the losses; a validation at the last step of a phase evaluates "
    "the model before it grows."
)


def growth_timeline(run: ProgressiveRun) -> str:
    """Returns the timeline of a run's growth as SVG."""
    bands = [
        (
            _title(phase.name.removeprefix("progressive_")),
            float(phase.first_iteration),
            float(phase.iteration),
        )
        for phase in run.phases
    ]
    return timeline_chart(
        growth_blocks(run),
        bands,
        y_label="layer",
        line=("training", _curve(run.losses)) if run.losses else None,
        points=("validation", _curve(run.validation)) if run.validation else None,
        curves_label="loss",
    )


def growth_blocks(run: ProgressiveRun) -> list[Block]:
    """Returns one rectangle for each phase and each stack that exists in the phase."""
    blocks = []
    for phase in run.phases:
        for stack, layers in run.rack.first(len(phase.stack_bytes)).layers():
            noted = bool(phase.stack_treatments)
            precision = phase.stack_precisions[stack.index] if noted else stack.precision
            number = f"stack {stack.index}"
            own = f"{number}, {precision}" if precision is not None else number
            blocks.append(
                Block(
                    begin=phase.first_iteration,
                    end=phase.iteration,
                    rows=layers,
                    kind=_KINDS[phase.stack_treatments[stack.index]] if noted else _NOT_NOTED,
                    labels=(own, number, str(stack.index)),
                )
            )
    return blocks


def _phase_charts(figures: RunFigures) -> list[tuple[str, str]]:
    names = [_title(phase.name) for phase in figures.phases]
    memory = [phase.peak_memory_bytes / _MEBI for phase in figures.phases]
    charts = [
        (
            bar_chart(dict(zip(names, memory, strict=True)), y_label="peak memory, MiB"),
            "Peak memory since the process began, at the end of each phase.",
        )
    ]
    times = {
        _title(phase.name): phase.step_seconds * 1e3
        for phase in figures.phases
        if phase.step_seconds is not None
    }
    if times:
        charts.append((bar_chart(times, y_label="step, ms"), "Time of a step in each phase."))
    return charts


def _loss_charts(runs: Sequence[ProgressiveRun]) -> list[tuple[str, str]]:
    charts = []
    for what, found in (
        ("training time, s", {run.name: run.validation_by_seconds() for run in runs}),
        ("tokens", {run.name: run.validation_by_tokens() for run in runs}),
    ):
        curves = {name: curve for name, curve in found.items() if curve[0]}
        if curves:
            svg = curves_chart(curves, y_label="validation loss", x_label=what)
            charts.append((svg, f"Validation loss over {what.removesuffix(', s')}."))
    return charts


def _table(title: str, rows: list[dict[str, Cell]]) -> Table:
    columns = [
        name
        for name in dict.fromkeys(key for row in rows for key in row)
        if any(r[name] is not None for r in rows)
    ]
    return Table(title=title, columns=columns, rows=[[row[name] for name in columns] for row in rows])


def _title(name: str) -> str:
    return name.replace("_", " ")


def _curve(values: Mapping[int, float]) -> Curve:
    return list(values), list(values.values())


def _scaled(value: float | None, factor: float) -> float | int | None:
    return None if value is None else _short(value * factor)


def _short(value: float) -> float | int:
    """Rounds numbers of at least 1000 to integers."""
    return round(value) if abs(value) >= 1000 else value
