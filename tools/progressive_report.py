#!/usr/bin/env python3
"""Compares progressive training runs: time, memory and losses of each run and phase, as tables, JSON and an HTML page.

A run is given as the --save directory of pretrain_progressive.py, which contains progressive.json. Step times and
losses are reported if this directory contains a directory `tensorboard` (the run's --tensorboard-dir); held-out losses
are reported if it contains evaluation.json, written by tools/evaluate.py.
"""

import json
from dataclasses import asdict, dataclass

from megatron_ext.config.command_line.parse import parse, run_main


@dataclass(frozen=True, kw_only=True)
class ProgressiveReportConfig:
    """Flags for the runs to compare, and the report to write."""

    runs: tuple[str, ...]
    """Runs to compare, each as NAME=DIR: a name for the report, and the run's --save directory."""

    reference: str | None = None
    """Name of the run to compare with: all step times and memory figures are divided by the figures of this run."""

    html: str | None = None
    """HTML file to write with tables, growth timelines and loss curves; requires matplotlib."""

    output: str | None = None
    """JSON file to write the figures to."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for text in self.runs:
            name, equals, directory = text.partition("=")
            if not (name and equals and directory):
                raise ValueError(f"--runs {text}: must be NAME=DIR")
            if name in seen:
                raise ValueError(f"--runs {text}: the name {name} is given twice; each run needs its own")
            seen.add(name)


def main() -> None:
    """Compares the runs; writes and prints the report."""
    config: ProgressiveReportConfig = parse(
        ProgressiveReportConfig,
        prog="tools/progressive_report.py",
        description=str(__doc__),
        example="python tools/progressive_report.py --runs grown=runs/grown whole=runs/end_to_end --reference whole "
        "--html report.html",
    )
    from megatron_ext.progressive.report.comparison_figures import compare_runs
    from megatron_ext.progressive.report.comparison_page import (
        messages,
        phases_table,
        report_page,
        runs_table,
    )
    from megatron_ext.progressive.report.printed_tables import print_table
    from megatron_ext.progressive.report.training_results import read_run
    from megatron_ext.reports.charts import require_matplotlib
    from megatron_ext.reports.report_files import check_report_writable, write_report

    for flag, path in (("--html", config.html), ("--output", config.output)):
        if path is not None:
            check_report_writable(flag, path)
    if config.html is not None:
        require_matplotlib(f"--html {config.html}")
    named = (text.partition("=") for text in config.runs)
    runs = [read_run(name, directory) for name, _, directory in named]
    comparison = compare_runs(runs, config.reference)
    if config.output is not None:
        write_report(config.output, json.dumps(asdict(comparison), indent=2, allow_nan=False) + "\n")
    if config.html is not None:
        write_report(config.html, report_page(runs, comparison))
    for table in (runs_table(comparison), phases_table(comparison)):
        print_table(table)
    print("\n".join(messages(comparison)))
    written = [path for path in (config.output, config.html) if path is not None]
    if written:
        print(f"written: {', '.join(written)}")


if __name__ == "__main__":
    run_main(main)
