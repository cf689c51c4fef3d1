"""Shows a run's progress: a live bar on a terminal, otherwise plain lines.

One plain line is printed per log interval; its fields are separated by ` | `, so that `grep`, `cut` or a spreadsheet
can read it. The bar shows the same fields and is updated at every step.
"""

from datetime import timedelta
from typing import TextIO

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

Fields = dict[str, str]
"""The fields of a progress display: maps each name to the text of its value, in the order of display."""


class PlainProgress:
    """Prints one line per log interval."""

    def __init__(self, stream: TextIO, total_iterations: int) -> None:
        self._stream = stream
        self._total = total_iterations

    def update(self, iteration: int, fields: Fields, interval_ends: bool) -> None:
        """Prints the step and its fields if the step ends a log interval."""
        if interval_ends:
            width = len(str(self._total))
            shown = [
                f"step {iteration:{width}d}/{self._total}",
                *(f"{name} {text}" for name, text in fields.items()),
            ]
            self.message(" | ".join(shown))

    def message(self, text: str) -> None:
        """Prints a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Does nothing; lines are flushed as they are printed."""


class LiveProgress:
    """A progress bar at the bottom of a terminal, with the fields below it; messages scroll above the bar."""

    def __init__(self, console: Console, total_iterations: int, iteration: int) -> None:
        self._bar = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), expand=True)
        self._task = self._bar.add_task("", total=total_iterations, completed=iteration)
        self._live = Live(self._bar, console=console, refresh_per_second=4)
        self._live.start()

    def update(self, iteration: int, fields: Fields, interval_ends: bool) -> None:
        """Updates the bar and its fields."""
        self._bar.update(self._task, completed=iteration)
        shown = [Text(f"{name} {text}") for name, text in fields.items()]
        self._live.update(Group(self._bar, Columns(shown, padding=(0, 3, 0, 0))))

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Stops updating and releases the terminal; the bar stays visible."""
        self._live.stop()


def open_progress(stream: TextIO, total_iterations: int, iteration: int) -> PlainProgress | LiveProgress:
    """Returns a live bar if `stream` is a terminal, otherwise plain lines."""
    console = Console(file=stream)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveProgress(console, total_iterations, iteration)
    return PlainProgress(stream, total_iterations)


def compact(number: float) -> str:
    """Formats a number with three digits and the letter of a unit: 1234567 becomes `1.23M`."""
    for power, unit in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(number) >= 0.9995 * 10.0**power:
            return f"{number / 10.0**power:.3g}{unit}"
    return f"{number:.3g}"


def binary_size(size: float) -> str:
    """Formats bytes, for example `1.50 GiB`, in the largest unit for which the number is at least 0.1 (1 for TiB)."""
    for power, unit, least in ((40, "TiB", 1), (30, "GiB", 0.1), (20, "MiB", 0.1), (10, "KiB", 0.1)):
        if size >= least * 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size:.0f} B"


def clock(seconds: float) -> str:
    """Formats seconds as `1:02:03`, preceded by days if there are any."""
    return str(timedelta(seconds=round(seconds)))
