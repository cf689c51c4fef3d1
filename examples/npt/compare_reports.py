#!/usr/bin/env python3
"""Prints reports of tools/evaluate_npt.py as one table, with one row per report.

python examples/npt/compare_reports.py closed_form.json trained.json
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(paths: list[str]) -> None:
    """Prints the table."""
    table = Table(title="perplexity of base and NPT, KL(base || NPT) in nats per token")
    table.add_column("report")
    for column in ("tokens", "base", "NPT", "ratio", "KL"):
        table.add_column(column, justify="right")
    for path in map(Path, paths):
        report = json.loads(path.read_text(encoding="utf-8"))
        found, kl = report["perplexity"], report["logit_kl"]["mean"]
        figures = [f"{found[key]:.4f}" for key in ("base", "npt", "perplexity_ratio")]
        table.add_row(path.stem, f"{found['tokens']:,}", *figures, f"{kl:.5f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
