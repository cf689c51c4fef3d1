#!/usr/bin/env python3
"""Draws the TensorBoard files of one or more runs: losses, heat maps (layer x step) of per-layer values, other curves.

The output is a self-contained HTML page (--html), or a directory of pictures (--output-dir). Each run in or below the
given directory gets its own sections. Curriculum stages are shaded. Requires matplotlib.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_ext.config.command_line.field_checks import flag
from megatron_ext.config.command_line.parse import parse, run_main

if TYPE_CHECKING:
    from megatron_ext.reports.training_charts import Chart


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Flags for the runs to draw and the files to write."""

    tensorboard_dir: Annotated[str, flag(aliases=("--logdir",))]
    """TensorBoard directory of a run, or a directory that contains several of them."""

    html: str | None = None
    """HTML file to write."""

    output_dir: str | None = None
    """Directory to write one SVG file per chart to, with one subdirectory per run if there are several runs."""

    tags: str = ""
    """Draw only the tags that contain a match of this regular expression."""

    def __post_init__(self) -> None:
        if (self.html is None) == (self.output_dir is None):
            raise ValueError("--html, --output-dir: give exactly one of them")
        try:
            re.compile(self.tags)
        except re.error as error:
            raise ValueError(f"--tags {self.tags}: not a regular expression: {error}") from None


def main() -> None:
    """Draws the charts, and prints where they were written."""
    config: VisualizeConfig = parse(
        VisualizeConfig,
        prog="tools/visualize_training.py",
        description=str(__doc__),
        example="python tools/visualize_training.py --tensorboard-dir runs/npt/tensorboard --html training.html",
    )
    from megatron_ext.registry.known_charts import KNOWN_CHARTS
    from megatron_ext.reports.charts import require_matplotlib
    from megatron_ext.reports.events import find_runs, read_curves
    from megatron_ext.reports.report_files import check_report_writable, write_report
    from megatron_ext.reports.training_charts import constant_values, training_charts

    target = config.html if config.html is not None else str(Path(config.output_dir or "", "x.svg"))
    check_report_writable("--html" if config.html is not None else "--output-dir", target)
    require_matplotlib("tools/visualize_training.py")
    found, constant = {}, {}

    def wanted(tag: str) -> bool:
        return re.search(config.tags, tag) is not None

    for name, folder in find_runs(config.tensorboard_dir).items():
        curves = read_curves(folder)
        found[name] = training_charts(curves, KNOWN_CHARTS, wanted)
        constant[name] = _sentence(constant_values(curves, wanted))
    count = sum(map(len, found.values()))
    if not count and not any(constant.values()):
        raise ValueError(
            f"--tensorboard-dir {config.tensorboard_dir}: the TensorBoard files have no scalars"
            + f" that match --tags {config.tags}" * bool(config.tags)
        )
    if config.html is not None:
        write_report(config.html, _page(f"Training: {config.tensorboard_dir}", found, constant))
    for name, charts in found.items() if config.output_dir is not None else ():
        for chart in charts:
            ending = "_layers" if chart.is_heat_map else ""
            file = f"{_file_name(chart.name)}{ending}.svg"
            write_report(Path(config.output_dir or "", name, file), chart.svg)
    for name, sentence in constant.items():
        if sentence:
            print(f"{name}: {sentence}" if name else sentence)
    print(f"{config.html or config.output_dir}: {count} charts")


def _sentence(constant: "Mapping[str, float]") -> str:
    return "Constant: " + ", ".join(f"{tag} {value:g}" for tag, value in constant.items()) if constant else ""


def _page(title: str, found: "Mapping[str, Sequence[Chart]]", constant: "Mapping[str, str]") -> str:
    from megatron_ext.reports.page import Page

    page = Page(title, has_contents=True)
    for run, charts in found.items():
        for section, of_section in groupby(charts, key=lambda chart: chart.section):
            page.heading(f"{run}: {section}" if run else section)
            page.pictures([(chart.svg, chart.caption) for chart in of_section], in_columns=True)
        if constant[run]:
            page.heading(f"{run}: Constant values" if run else "Constant values")
            page.paragraph(constant[run])
    return page.html()


def _file_name(tag: str) -> str:
    return re.sub(r"[^\w.-]+", "_", tag).strip("_")


if __name__ == "__main__":
    run_main(main)
