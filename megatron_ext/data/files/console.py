"""A progress bar for the tools that read token ids; shows tokens/s and the time left, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Column of the progress bar that shows millions of tokens per second."""

    def render(self, task: Task) -> Text:
        """Returns the rate as text; empty text before it is known."""
        return Text(f"{task.speed / 1e6:.1f}M tokens/s" if task.speed else "")


@contextmanager
def token_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances the bar by a number of tokens; it does nothing if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda tokens: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda tokens: bar.advance(task, tokens)
