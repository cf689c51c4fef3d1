"""Signals that end a run in good order: it finishes the step, saves, and exits with a code that tells which one came.

A handler only sets a flag. At the end of a step all ranks agree on it, since a signal may reach one rank a step before
another, and a save is collective. A second Ctrl-C ends the process at once; as `torchrun` passes on a SIGINT that the
terminal has already sent to every process, one that follows within two seconds counts as the same.

    exit code = 128 + number of the signal, the shell's own convention: SIGHUP 129, SIGINT 130, SIGUSR1 138, SIGTERM 143

Signals of a process group reach the loader processes too, which hold them back: see `data.loader_processes`. A SIGHUP
that the run was started to ignore (`nohup`) stays ignored.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.platform import process_groups

EXIT_SIGHUP = 128 + signal.SIGHUP
"""Exit code of a run that saved and left on SIGHUP (its terminal was closed)."""

EXIT_SIGINT = 128 + signal.SIGINT
"""Exit code of a run that saved and left on SIGINT (Ctrl-C)."""

EXIT_SIGUSR1 = 128 + signal.SIGUSR1
"""Exit code of a run that saved and left on SIGUSR1 (a scheduler's warning before its time limit)."""

EXIT_SIGTERM = 128 + signal.SIGTERM
"""Exit code of a run that saved and left on SIGTERM (preemption, `kill`)."""

EXIT_CODES = {
    signal.SIGHUP: EXIT_SIGHUP,
    signal.SIGINT: EXIT_SIGINT,
    signal.SIGUSR1: EXIT_SIGUSR1,
    signal.SIGTERM: EXIT_SIGTERM,
}
"""Handled signal -> exit code."""


_SAME_INTERRUPT_SECONDS = 2.0


class SignalWatcher:
    """Notes signals from `__enter__` to `__exit__`; use as `with SignalWatcher() as signals:` around the loop."""

    def __init__(self) -> None:
        self._received = 0
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalWatcher":
        for number in EXIT_CODES:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed_exit_code(self) -> int | None:
        """The exit code if any rank has received a signal, None if none has; the same on every rank. Collective.

        Costs one reduction of one number; where ranks received different signals the highest number counts.
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
