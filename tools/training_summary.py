#!/usr/bin/env python3
"""Prints a table of a training run's losses from its TensorBoard files, and optionally the result of an evaluation."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.command_line.field_checks import check_at_least
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.reports.events import read_curves


@dataclass(frozen=True, kw_only=True)
class SummaryConfig:
    """Flags for the run to summarize."""

    tensorboard_dir: str
    """TensorBoard directory of the run."""

    evaluation: str | None = None
    """JSON file written by tools/evaluate.py, to print its losses too."""

    rows: int = 10
    """Largest number of rows in the table. They are the first, the last and the evaluated steps, and further steps at
    equal intervals.
    """

    def __post_init__(self) -> None:
        check_at_least(self, 2, "rows")


def main() -> None:
    """Prints the table of losses, and the evaluation if one is given."""
    config: SummaryConfig = parse(
        SummaryConfig,
        prog="tools/training_summary.py",
        description="Print a table of a run's losses from its TensorBoard files.",
        example="python tools/training_summary.py --tensorboard-dir runs/quickstart/tensorboard",
    )
    from rich.console import Console
    from rich.table import Table

    losses, validation = _read(config.tensorboard_dir)
    table = Table(title="cross-entropy in nats per token")
    for column in (
        "step",
        "training loss (mean since the row above)",
        "validation loss",
        "validation perplexity",
    ):
        table.add_column(column, justify="right")
    above = 0
    for step in pick(sorted(losses), sorted(validation), config.rows):
        loss = validation.get(step)
        shown = ("", "") if loss is None else (f"{loss:.4f}", f"{math.exp(loss):.2f}")
        since = [losses[s] for s in losses if above < s <= step]
        above = step
        table.add_row(str(step), f"{math.fsum(since) / len(since):.4f}" if since else "", *shown)
    console = Console(width=100)
    console.print(table)
    if config.evaluation is not None:
        for prefix, found in json.loads(Path(config.evaluation).read_text(encoding="utf-8")).items():
            console.print(_describe(prefix, found), highlight=False, soft_wrap=True)


def _read(directory: str) -> tuple[dict[int, float], dict[int, float]]:
    """Returns the training losses and the validation losses, each by step.

    Raises:
        FileNotFoundError: the directory has no event files.
        ValueError: the event files contain no losses.
    """
    curves = read_curves(directory, required="lm loss")
    training, validation = (
        dict(zip(*curves.get(tag, ([], [])), strict=True)) for tag in ("lm loss", "lm loss validation")
    )
    return training, validation


def pick(steps: list[int], evaluated: list[int], rows: int) -> list[int]:
    """Returns at most `rows` steps: the first, the last, evaluated steps, and multiples of a round number."""
    kept = {steps[0], steps[-1]}
    for every in range(1, len(evaluated) + 1):
        if len(found := kept.union(evaluated[::-every])) <= rows:
            kept = found
            break
    # Multiples that contain the evaluated steps are preferred, because then all distances are equal.
    inner = kept - {steps[0], steps[-1]}
    intervals = list(_round_numbers(steps[-1]))
    even = [interval for interval in intervals if not any(step % interval for step in inner)]
    for interval in even + intervals:
        found = kept.union(step for step in steps if step % interval == 0)
        if len(found) <= rows:
            return sorted(found)
    return sorted(kept)


def _round_numbers(largest: int) -> Iterator[int]:
    """Yields 1, 2, 5, 10, 20, 25, 50, 100, ... up to `largest`."""
    power = 1
    while power <= largest:
        yield from (number for number in (power, 2 * power, 5 * power // 2, 5 * power) if number <= largest)
        power *= 10


def _describe(prefix: str, found: dict[str, float]) -> str:
    step = f", step {found['step']}" if "step" in found else ""
    line = f"held-out {prefix}{step}: loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
    if "unigram_cross_entropy" in found:
        entropy = found["unigram_cross_entropy"]
        line += f"; unigram baseline {entropy:.4f} (perplexity {math.exp(entropy):.2f})"
    return line


if __name__ == "__main__":
    run_main(main)
