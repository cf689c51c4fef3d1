#!/usr/bin/env python3
"""Draws all curves in the TensorBoard files of one or more runs, and a heat map for each group of tags `name/layer_N`.

The output is one self-contained HTML page (--html), or a directory of pictures (--output-dir). Each run below the given
directory gets its own section. Stages of a curriculum are shaded. Requires matplotlib.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.command_line.parse import parse, run_main


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Runs to draw, and the output."""

    logdir: str
    """TensorBoard directory of a run, or a directory with several of them."""

    html: str | None = None
    """HTML file to write."""

    output_dir: str | None = None
    """Directory to write one SVG file per chart to; several runs get a subdirectory each."""

    tags: str = ""
    """Draw only the tags that match this regular expression (a match anywhere counts)."""

    def __post_init__(self) -> None:
        if (self.html is None) == (self.output_dir is None):
            raise ValueError("--html, --output-dir: give exactly one of them")
        try:
            re.compile(self.tags)
        except re.error as error:
            raise ValueError(f"--tags {self.tags}: not a regular expression: {error}") from None


def main() -> None:
    """Draws the charts and prints where they are."""
    config: VisualizeConfig = parse(
        VisualizeConfig,
        prog="tools/visualize_training.py",
        description=str(__doc__),
        example="python tools/visualize_training.py --logdir runs/npt/tensorboard --html training.html",
    )
    from megatron_ext.reports.charts import require_matplotlib
    from megatron_ext.reports.events import find_runs, read_curves
    from megatron_ext.reports.page import Page
    from megatron_ext.reports.report_files import check_writable, write_text
    from megatron_ext.reports.training_charts import training_charts

    target = config.html if config.html is not None else str(Path(config.output_dir or "", "x.svg"))
    check_writable("--html" if config.html is not None else "--output-dir", target)
    require_matplotlib("tools/visualize_training.py")
    found = {}
    for name, folder in find_runs(config.logdir).items():
        curves = read_curves(folder, flag="--logdir")
        found[name] = training_charts(curves, lambda tag: re.search(config.tags, tag) is not None)
    count = sum(map(len, found.values()))
    if not count:
        raise ValueError(
            f"--logdir {config.logdir}: the TensorBoard files have no scalars"
            + f" that match --tags {config.tags}" * bool(config.tags)
        )
    if config.html is not None:
        page = Page(f"Training: {config.logdir}")
        for name, charts in found.items():
            page.heading(name or "Curves")
            page.pictures([(chart.svg, chart.caption) for chart in charts])
        write_text(config.html, page.html())
        print(f"{config.html}: {count} charts")
        return
    for name, charts in found.items():
        for chart in charts:
            write_text(Path(config.output_dir or "", name, f"{_file_name(chart.name)}.svg"), chart.svg)
    print(f"{config.output_dir}: {count} charts")


def _file_name(tag: str) -> str:
    return re.sub(r"[^\w.-]+", "_", tag).strip("_")


if __name__ == "__main__":
    run_main(main)
