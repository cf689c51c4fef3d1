"""Draws a timeline: rectangles over ranges of steps, and optional curves below on the same x axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_ext.reports.charts import COLOURS, Band, count_in_whole_numbers, stacked_axes
from megatron_ext.reports.events import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 8.6
_INCHES_A_LETTER = 0.085
_MOST_ROW_LABELS = 16


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of rectangle: all rectangles of one kind share a colour and an entry in the legend."""

    name: str
    """Text in the legend."""

    colour: str
    text_colour: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """One rectangle of the timeline."""

    begin: float
    """First step."""

    end: float
    """Last step."""

    rows: range
    """Rows that the rectangle covers; row 0 is at the bottom."""

    kind: Kind
    labels: tuple[str, ...]
    """Alternative texts from long to short; the first that fits is written into the rectangle."""


def timeline_chart(
    blocks: Sequence[Block],
    bands: Sequence[Band],
    *,
    y_label: str,
    line: tuple[str, Curve] | None = None,
    points: tuple[str, Curve] | None = None,
    curves_label: str = "",
) -> str:
    """Draws the rectangles with named ranges of steps above them, and a chart of curves below if any are given.

    Args:
        blocks: the rectangles; at least one.
        bands: name, first step and last step of consecutive ranges that cover the whole x axis.
        y_label: label of the y axis of the rectangles.
        line: name and values of a curve to draw as a thin line.
        points: name and values of a curve to draw as large points.
        curves_label: label of the y axis of the curves.
    """
    rows = max(block.rows.stop for block in blocks)
    has_curves = line is not None or points is not None
    heights = [1.3 + min(0.3, 4.5 / rows) * rows, *([2.2] if has_curves else [])]
    with stacked_axes(_WIDTH, heights, "") as (axes, out):
        first, last = bands[0][1], bands[-1][2]
        letters_a_step = (_WIDTH - 0.8) / _INCHES_A_LETTER / (last - first)
        _draw_blocks(axes[0], blocks, rows, letters_a_step)
        _name_bands(axes[0], bands, letters_a_step)
        axes[0].set(ylabel=y_label, xlim=(first, last))
        if has_curves:
            _draw_curves(axes[1], line, points)
            axes[1].set_ylabel(curves_label)
        for each in axes:
            for _, _, end in bands[:-1]:
                each.axvline(end, color="0.25", linewidth=0.9, linestyle=(0, (4, 3)))
        axes[0].figure.align_labels()
        axes[-1].set_xlabel("step")
        count_in_whole_numbers(axes[-1].xaxis)
    return out[0]


def _draw_blocks(axes: "Axes", blocks: Sequence[Block], rows: int, letters_a_step: float) -> None:
    from matplotlib.patches import Patch, Rectangle

    for block in blocks:
        width, height = block.end - block.begin, len(block.rows)
        corner = (block.begin, block.rows.start)
        axes.add_patch(Rectangle(corner, width, height, facecolor=block.kind.colour, edgecolor="none"))
        for row in list(block.rows)[1:]:
            axes.plot([block.begin, block.end], [row, row], color="white", linewidth=0.6, alpha=0.7)
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="white", linewidth=2))
        label = _first_that_fits(block.labels, width * letters_a_step)
        place = (block.begin + width / 2, block.rows.start + height / 2)
        # The filled box hides the lines between rows behind the text.
        box = {"facecolor": block.kind.colour, "edgecolor": "none", "pad": 1.5}
        axes.text(
            *place,
            label,
            ha="center",
            va="center",
            fontsize="small",
            color=block.kind.text_colour,
            bbox=box,
        )
    axes.set_ylim(0, rows)
    labelled = range(0, rows, -(-rows // _MOST_ROW_LABELS))
    axes.set_yticks([row + 0.5 for row in labelled], [str(row) for row in labelled])
    axes.tick_params(axis="y", length=0)
    kinds = dict.fromkeys(block.kind for block in blocks)
    axes.figure.legend(
        handles=[Patch(facecolor=kind.colour, label=kind.name) for kind in kinds],
        loc="outside upper center",
        ncols=len(kinds),
        fontsize="small",
        frameon=False,
    )


def _name_bands(axes: "Axes", bands: Sequence[Band], letters_a_step: float) -> None:
    for name, begin, end in bands:
        text = _first_that_fits([name], (end - begin) * letters_a_step)
        axes.annotate(
            text,
            ((begin + end) / 2, 1),
            xytext=(0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize="small",
        )


def _draw_curves(axes: "Axes", line: tuple[str, Curve] | None, points: tuple[str, Curve] | None) -> None:
    if line is not None:
        axes.plot(*line[1], color=COLOURS[0], linewidth=0.9, label=line[0])
    if points is not None:
        name, (steps, values) = points
        # clip_on=False: a point at the last step would otherwise be half hidden.
        axes.plot(steps, values, "o", color=COLOURS[1], markersize=4, label=name, clip_on=False, zorder=3)
    axes.legend(fontsize="small", frameon=False)


def _first_that_fits(labels: Sequence[str], letters: float) -> str:
    return next((label for label in labels if len(label) <= letters), "")
