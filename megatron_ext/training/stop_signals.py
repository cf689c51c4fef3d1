"""Ends a run cleanly on a signal: it finishes the step, saves, and exits with a code that identifies the signal.

    exit code = 128 + number of the signal (the shell's convention): SIGHUP 129, SIGINT 130, SIGUSR1 138, SIGTERM 143

A handler only sets a flag. At the end of a step all ranks combine their flags, because a signal may reach one rank a
step earlier than another, and saving is collective. A second Ctrl-C ends the process at once. Loader processes get the
same signals and ignore them; see `data.datasets.loader_processes`.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

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


# `torchrun` forwards a SIGINT that the terminal has already sent to every process: one Ctrl-C arrives twice.
_SAME_INTERRUPT_SECONDS = 2.0


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

    def agreed_exit_code(self) -> int | None:
        """Returns the exit code if any rank has received a signal, else None; equal on every rank. Collective.

        If ranks have received different signals, the signal with the highest number counts.
        """
        received = torch.tensor([self._received], dtype=torch.int32, device=process_groups.device())
        dist.all_reduce(received, op=dist.ReduceOp.MAX)
        number = int(received.item())
        return EXIT_CODES[signal.Signals(number)] if number else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is not None and now - self._interrupted_at > _SAME_INTERRUPT_SECONDS:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        self._received = max(self._received, number)
