#!/usr/bin/env python3
"""Draws runs from their TensorBoard files: every curve, and a layer x step heat map of every tag `name/layer_N`.

One HTML page that opens offline (--html), or a picture for every tag (--output-dir). A directory of several runs, as
sequential training leaves, gives a section for each. Stages of a curriculum are shaded. Needs matplotlib.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.command_line.parse import parse, run_main


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """What to read and where to draw."""

    logdir: str
    """Directory of TensorBoard files, or of folders with such files."""

    html: str | None = None
    """HTML file to write."""

    output_dir: str | None = None
    """Directory for the pictures as SVG files, one a chart; with several runs a folder each."""

    tags: str = ""
    """Regular expression: draw only tags in which it is found."""

    def __post_init__(self) -> None:
        if (self.html is None) == (self.output_dir is None):
            raise ValueError("--html, --output-dir: give one of them")
        try:
            re.compile(self.tags)
        except re.error as error:
            raise ValueError(f"--tags {self.tags}: not a regular expression: {error}") from None


def main() -> None:
    """Reads, draws, prints what was written."""
    config: VisualizeConfig = parse(
        VisualizeConfig,
        prog="tools/visualize_training.py",
        description=str(__doc__),
        example="python tools/visualize_training.py --logdir runs/npt/tensorboard --html training.html",
    )
    from megatron_ext.reports.charts import require_matplotlib
    from megatron_ext.reports.events import find_runs, read_curves
    from megatron_ext.reports.page import Page
    from megatron_ext.reports.report_files import check_report_writable, write_report
    from megatron_ext.reports.training_charts import training_charts

    target = config.html if config.html is not None else str(Path(config.output_dir or "", "x.svg"))
    check_report_writable("--html" if config.html is not None else "--output-dir", target)
    require_matplotlib("tools/visualize_training.py")
    found = {}
    for name, folder in find_runs(config.logdir).items():
        curves = read_curves(folder, flag="--logdir")
        found[name] = training_charts(curves, lambda tag: re.search(config.tags, tag) is not None)
    count = sum(map(len, found.values()))
    if not count:
        raise ValueError(
            f"--logdir {config.logdir}: its files hold no scalars"
            + f" with --tags {config.tags}" * bool(config.tags)
        )
    if config.html is not None:
        page = Page(f"Training: {config.logdir}")
        for name, charts in found.items():
            page.heading(name or "Curves")
            page.pictures([(chart.svg, chart.caption) for chart in charts])
        write_report(config.html, page.html())
        print(f"{config.html}: {count} charts")
        return
    for name, charts in found.items():
        for chart in charts:
            write_report(Path(config.output_dir or "", name, f"{_file_name(chart.name)}.svg"), chart.svg)
    print(f"{config.output_dir}: {count} charts")


def _file_name(tag: str) -> str:
    return re.sub(r"[^\w.-]+", "_", tag).strip("_")


if __name__ == "__main__":
    run_main(main)
