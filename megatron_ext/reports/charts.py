"""Draws curves, heat maps, histograms and bars with matplotlib and returns them as SVG text.

Values that are not finite are left out. A scale is logarithmic if all values are positive and span more than two
orders of magnitude. Equal input gives equal SVG text: it contains no dates and no random names.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_ext.reports.events import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Band = tuple[str, float, float]
"""Label, begin and end of a shaded range of the x axis."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
"""Palette by Okabe and Ito; colour-blind readers can distinguish its colours."""

_MOST_COLUMNS = 300
"""Largest number of columns in a heat map over steps; more steps are averaged into this many columns."""
_LOG_SPAN = 100.0
_HIGHEST = 4.5
"""Largest total height of a heat map's rows, in inches; if there are many rows, each is made lower."""
_MOST_ROW_LABELS = 24


def require_matplotlib(what: str) -> None:
    """Raises `ValueError` if matplotlib is not installed; the message says that `what`, a flag or tool, requires it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(f"{what}: requires matplotlib; pip install 'megatron-ext[plots]'") from None


def curves_chart(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    y_label: str,
    title: str = "",
    bands: Sequence[Band] = (),
    x_label: str = "step",
) -> str:
    """Draws one line per curve, with a legend if there are several.

    Args:
        curves: for each name in the legend, the x values (steps, unless `x_label` says otherwise) and the y values.
        y_label: label of the y axis.
        title: text above the chart.
        bands: ranges of the x axis to shade and to label at the top.
        x_label: label of the x axis.
    """
    with _chart(6.4, 3.2, title) as (axes, out):
        for name, (steps, values) in curves.items():
            kept = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
            marker = "." if len(kept) < 30 else ""
            axes.plot([s for s, _ in kept], [v for _, v in kept], marker=marker, linewidth=1.2, label=name)
        for number, (label, begin, end) in enumerate(bands):
            axes.axvspan(begin, end, color="0.9" if number % 2 else "0.96", zorder=0)
            axes.annotate(
                label, ((begin + end) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom"
            )
        drawn = [v for _, values in curves.values() for v in values if math.isfinite(v)]
        if _spans_orders(np.array(drawn)):
            axes.set_yscale("log")
            _write_plainly(axes.yaxis)
        else:
            axes.ticklabel_format(axis="y", useOffset=False)
        axes.set(xlabel=x_label, ylabel=y_label)
        count_in_whole_numbers(axes.xaxis)
        if len(curves) > 1:
            axes.legend(fontsize="small", frameon=False)
    return out[0]


def step_heat_map(
    layers: dict[int, Curve],
    *,
    title: str,
    bands: Sequence[Band] = (),
    row_name: str = "layer",
) -> str:
    """Draws a heat map with one row per layer and steps on the x axis; more than 300 steps are averaged to 300 columns.

    Args:
        layers: for each row number, the steps and the values.
        title: text above the chart; it names the values.
        bands: ranges of steps to separate by lines and to label at the top.
        row_name: label of the y axis.
    """
    values, first, last = _binned(layers)
    with _chart(6.4, 1.4 + min(0.22 * len(layers), _HIGHEST), title) as (axes, out):
        width = max((last - first) / max(values.shape[1] - 1, 1), 1)
        extent = (first - width / 2, last + width / 2, len(layers) - 0.5, -0.5)
        image = axes.imshow(values, aspect="auto", extent=extent, norm=_norm(values), interpolation="nearest")
        labelled = range(0, len(layers), -(-len(layers) // _MOST_ROW_LABELS))
        axes.set_yticks(labelled, [str(list(layers)[row]) for row in labelled])
        axes.set(xlabel="step", ylabel=row_name)
        count_in_whole_numbers(axes.xaxis)
        for name, begin, end in bands:
            if end < first or begin > last:
                continue
            begin, end = max(begin, first), min(end, last)
            axes.axvline(end, color="white", linewidth=0.8)
            axes.annotate(
                name, ((begin + end) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom"
            )
        axes.set_xlim(extent[0], extent[1])
        scale = axes.figure.colorbar(image, ax=axes)
        if _spans_orders(values):
            _write_plainly(scale.ax.yaxis)
    return out[0]


def metric_heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str = "",
    row_name: str = "layer",
) -> str:
    """Draws a table of numbers as a heat map; every column has its own colour scale, where darker is larger.

    Args:
        rows: row labels.
        columns: column labels.
        values: numbers as [rows][columns]; None is drawn as `-`.
        title: text above the chart.
        row_name: label of the y axis.
    """
    numbers = np.array([[math.nan if v is None else v for v in row] for row in values], dtype=float)
    shades = np.column_stack([_shades(column) for column in numbers.T])
    with _chart(1.6 + 1.25 * len(columns), 1.5 + 0.3 * len(rows), title) as (axes, out):
        axes.imshow(shades, aspect="auto", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        for (row, column), value in np.ndenumerate(numbers):
            text = f"{value:.3g}" if math.isfinite(value) else "-"
            axes.text(column, row, text, ha="center", va="center", fontsize="small")
        axes.set_xticks(range(len(columns)), columns, fontsize="small")
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.set_ylabel(row_name)
    return out[0]


def histogram_chart(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    x_label: str,
    title: str = "",
    y_label: str = "tokens",
    marks: Sequence[tuple[str, float]] = (),
) -> str:
    """Draws a histogram whose bins are already counted.

    Args:
        edges: bin edges, one more than there are counts.
        counts: number of values in each bin.
        x_label: label of the x axis.
        title: text above the chart.
        y_label: label of the y axis.
        marks: label and x position of each vertical line to draw.
    """
    with _chart(5.2, 3.0, title) as (axes, out):
        axes.stairs(counts, edges, fill=True, color="C0", alpha=0.7)
        for number, (label, place) in enumerate(marks):
            axes.axvline(place, color=f"C{number + 1}", linestyle="--", linewidth=1.2, label=label)
        axes.set(xlabel=x_label, ylabel=y_label)
        if marks:
            axes.legend(fontsize="small", frameon=False)
    return out[0]


def bar_chart(bars: dict[str, float], *, y_label: str, title: str = "") -> str:
    """Draws one bar per name, with its value above it."""
    with _chart(1.5 + 1.2 * len(bars), 3.0, title) as (axes, out):
        values = [value if math.isfinite(value) else 0.0 for value in bars.values()]
        drawn = axes.bar(range(len(bars)), values, color=[f"C{n}" for n in range(len(bars))], width=0.6)
        axes.bar_label(drawn, [f"{value:.4g}" for value in bars.values()], fontsize="small", padding=2)
        axes.set_xticks(range(len(bars)), list(bars))
        axes.margins(y=0.15)
        axes.set(ylabel=y_label)
    return out[0]


@contextmanager
def _chart(width: float, height: float, title: str) -> Iterator[tuple["Axes", list[str]]]:
    """Yields axes to draw on, and a list to which the SVG text is appended when the block ends."""
    with stacked_axes(width, [height], title) as (axes, out):
        yield axes[0], out


@contextmanager
def stacked_axes(
    width: float, heights: Sequence[float], title: str
) -> Iterator[tuple[list["Axes"], list[str]]]:
    """Yields axes stacked on a shared x axis, and a list to which the SVG text is appended when the block ends.

    Args:
        width: width of the figure in inches.
        heights: height of each of the axes in inches, from top to bottom.
        title: text above the chart.
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out: list[str] = []
    # fonttype: labels stay text. hashsalt: ids follow from the content. parse_math: `$` in a label is literal.
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "megatron_ext",
        "text.parse_math": False,
        "axes.prop_cycle": cycler(color=COLOURS),
    }
    with rc_context(settings):
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        grid = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
        axes = list(grid[:, 0])
        for each in axes:
            each.spines[["top", "right"]].set_visible(False)
        yield axes, out
        if title:
            figure.suptitle(title, fontsize="medium")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        out.append(stream.getvalue())


def _binned(layers: dict[int, Curve]) -> tuple[npt.NDArray[np.float64], int, int]:
    """Averages the curves over bins of steps.

    Returns:
        Three items: values [layers, bins], with NaN for empty bins; the first step; the last step.
    """
    steps = np.unique(np.concatenate([np.array(steps) for steps, _ in layers.values()]))
    first, last = int(steps[0]), int(steps[-1])
    bins = min(_MOST_COLUMNS, len(steps))
    sums, counts = np.zeros((len(layers), bins)), np.zeros((len(layers), bins))
    for row, (at, values) in enumerate(layers.values()):
        columns = ((np.array(at) - first) * (bins - 1) / max(last - first, 1)).round().astype(int)
        finite = np.isfinite(values)
        np.add.at(sums[row], columns[finite], np.array(values)[finite])
        np.add.at(counts[row], columns[finite], 1)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan), first, last


def _spans_orders(values: npt.NDArray[np.float64]) -> bool:
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() / finite.min() > _LOG_SPAN)


def count_in_whole_numbers(axis: Any) -> None:
    """Puts axis ticks at whole numbers only, because there is no step 0.5."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _write_plainly(axis: Any) -> None:
    """Labels a logarithmic axis with plain numbers such as 0.01 instead of powers of ten."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def _norm(values: npt.NDArray[np.float64]) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return LogNorm(low, high) if _spans_orders(values) else Normalize(low, high)


def _shades(column: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scales a column from 0 (its smallest value) to 1 (its largest); returns zeros if all values are equal.

    The scale is logarithmic under the same condition as that of a chart.
    """
    scaled = np.log(column) if _spans_orders(column) else column
    finite = scaled[np.isfinite(scaled)]
    if not len(finite) or finite.max() == finite.min():
        return np.where(np.isfinite(scaled), 0.0, np.nan)
    return np.asarray((scaled - finite.min()) / (finite.max() - finite.min()))
