"""Shows the progress of a preprocessing run: a live bar on a terminal, otherwise a line from time to time."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressDisplay:
    """Shows documents/s, MB/s, tokens/s and the time left, on standard error.

    Args:
        total_bytes: number of bytes of input on disk; None if not known.
        log_interval: number of documents between two progress lines, if standard error is not a terminal.
    """

    def __init__(self, total_bytes: int | None, log_interval: int) -> None:
        self._total, self._log_interval = total_bytes, log_interval
        self._begin = self._last_line = time.monotonic()
        self._next_documents = log_interval
        self._first: tuple[int, int, int] | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if sys.stderr.isatty():
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rates]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total_bytes, rates="")

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, documents: int, tokens: int, input_bytes: int) -> None:
        """Shows the progress. All three numbers count from the beginning of the dataset, also in a resumed run."""
        if self._first is None:  # shards that a killed run finished must not count as this run's speed
            self._first = (documents, tokens, input_bytes)
        seconds = max(time.monotonic() - self._begin, 1e-9)
        new = [
            now - before for now, before in zip((documents, tokens, input_bytes), self._first, strict=True)
        ]
        rates = f"{new[0] / seconds:,.0f} docs/s  {new[2] / seconds / 1e6:.1f} MB/s  {new[1] / seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=input_bytes, rates=rates)
        elif documents >= self._next_documents and time.monotonic() - self._last_line >= 1:
            self._last_line = time.monotonic()
            self._next_documents = documents + self._log_interval
            line = f"{documents:,} documents{self._share(input_bytes)}  {rates}"
            print(line + self._eta(new[2], input_bytes, seconds), file=sys.stderr, flush=True)

    def _share(self, input_bytes: int) -> str:
        return f" ({100 * input_bytes / self._total:.0f}%)" if self._total else ""

    def _eta(self, new_bytes: int, input_bytes: int, seconds: float) -> str:
        if not self._total or not new_bytes:
            return ""
        left = round((self._total - input_bytes) * seconds / new_bytes)
        return f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
