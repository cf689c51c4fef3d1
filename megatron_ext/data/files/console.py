"""Shows the progress of tools that read token ids: a bar on a terminal, otherwise a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINE_SECONDS = 10.0
"""Seconds between two lines; a shorter run prints no line."""


class _Rate(ProgressColumn):
    """Column of the progress bar that shows tokens per second."""

    def render(self, task: Task) -> Text:
        """Returns the rate as text; empty text before it is known."""
        return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "")


@contextmanager
def token_progress(description: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the display by a number of tokens.

    Args:
        description: what is being read, at the beginning of every line.
        total: number of tokens to read.
        shown: whether this process shows the progress; True in only one of several processes.
    """
    if not shown:
        yield lambda tokens: None
        return
    if not sys.stderr.isatty():
        yield ProgressLines(description, total).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda tokens: bar.advance(task, tokens)


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ProgressLines:
    """Prints a line from time to time, for a log file."""

    def __init__(
        self,
        description: str,
        total: int,
        *,
        unit: str = "tokens",
        write: Callable[[str], None] = _print_error,
    ) -> None:
        """Args:
        description: the current activity, printed at the beginning of every line.
        total: the count at the end.
        unit: unit of the count, such as tokens.
        write: prints a line.
        """
        self._description, self._total, self._unit, self._write = description, total, unit, write
        self._begin = self._last_line = time.monotonic()
        self._done, self._has_printed = 0, False

    def advance(self, count: int) -> None:
        """Increases the count, and prints a line if `_LINE_SECONDS` have passed since the last line.

        Once a line has been printed, a last one follows when the count reaches the total, so that a finished run does
        not look interrupted.
        """
        self._done += count
        now = time.monotonic()
        is_last = self._has_printed and self._done >= self._total
        if (now - self._last_line < _LINE_SECONDS and not is_last) or not self._done:
            return
        self._last_line, self._has_printed = now, True
        share, rate = self._done / self._total, self._done / (now - self._begin)
        self._write(
            f"{self._description}: {self._done:,} of {self._total:,} {self._unit} ({100 * share:.0f}%)  "
            f"{rate:,.{0 if rate >= 10 else 2}f} {self._unit}/s  "
            f"ETA {timedelta(seconds=round((self._total - self._done) / rate))}"
        )
