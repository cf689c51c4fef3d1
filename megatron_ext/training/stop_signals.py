"""Ends a run cleanly on a signal: it finishes the step, saves, and exits with a code that identifies the signal.

    exit code = 128 + number of the signal (the shell's convention): SIGHUP 129, SIGINT 130, SIGUSR1 138, SIGTERM 143

A handler only sets a flag. In every step all ranks combine their flags, because a signal may reach one rank a step
earlier than another, and saving is collective. The host reads the result together with the step's values, possibly
during the next step; the run then stops after this next step. A second Ctrl-C ends the process immediately, without
saving. Loader processes get the same signals and ignore them; see `data.datasets.loader_processes`.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.config.command_line.error_lines import tell_launcher
from megatron_ext.platform import process_groups

EXIT_SIGHUP = 128 + signal.SIGHUP
"""Exit code of a run that saved and stopped on SIGHUP (its terminal was closed)."""

EXIT_SIGINT = 128 + signal.SIGINT
"""Exit code of a run that saved and stopped on SIGINT (Ctrl-C)."""

EXIT_SIGUSR1 = 128 + signal.SIGUSR1
"""Exit code of a run that saved and stopped on SIGUSR1 (a scheduler's warning before its time limit)."""

EXIT_SIGTERM = 128 + signal.SIGTERM
"""Exit code of a run that saved and stopped on SIGTERM (preemption, `kill`)."""

EXIT_CODES = {
    signal.SIGHUP: EXIT_SIGHUP,
    signal.SIGINT: EXIT_SIGINT,
    signal.SIGUSR1: EXIT_SIGUSR1,
    signal.SIGTERM: EXIT_SIGTERM,
}
"""Maps each handled signal to its exit code."""

NO_SIGNAL = 1
"""Result of `SignalWatcher.shared` if no rank has received a signal."""


# `torchrun` forwards a SIGINT that the terminal has already sent to every process: one Ctrl-C arrives twice.
_SAME_INTERRUPT_SECONDS = 2.0


@contextmanager
def ending_at_once(text: str) -> Iterator[None]:
    """Context manager in which a signal ends the process immediately, with the signal's exit code.

    Rank 0 prints `text` before that. The process ends by `SystemExit`, so that locks and temporary files are removed.
    """
    ended_at: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        if ended_at and time.monotonic() - ended_at[0] < _SAME_INTERRUPT_SECONDS:
            return
        ended_at.append(time.monotonic())
        if process_groups.rank() == 0:
            print(text, flush=True)
        tell_launcher(text)
        raise SystemExit(EXIT_CODES[signal.Signals(number)])

    ignored = {number for number in EXIT_CODES if signal.getsignal(number) == signal.SIG_IGN}  # `nohup`
    previous = {number: signal.signal(number, end) for number in EXIT_CODES if number not in ignored}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class SignalWatcher:
    """Records signals inside a `with SignalWatcher() as signals:` block around the loop."""

    def __init__(self) -> None:
        self._received = 0
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalWatcher":
        for number in EXIT_CODES:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # the run was started with `nohup`
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def shared(self, *, time_is_left: bool) -> torch.Tensor:
        """Shares among all ranks whether the run has to stop, without making the host wait. Collective.

        Args:
            time_is_left: whether, by this rank's clock, the run may continue.

        Returns:
            Two float64 values on the device, equal on every rank. The first is NO_SIGNAL, or minus the number of a
            signal that a rank has received (the highest number, if there are several). The second is 1 if time is
            left on every rank, otherwise 0.
        """
        numbers = (float(-self._received if self._received else NO_SIGNAL), float(time_is_left))
        # `torch.tensor` would make the host wait for a copy to the device.
        device = process_groups.device()
        found = torch.stack(
            [torch.full((), number, dtype=torch.float64, device=device) for number in numbers]
        )
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return found

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        self._received = max(self._received, number)
