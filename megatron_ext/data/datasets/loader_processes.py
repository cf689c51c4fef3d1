"""Starts loader processes (the workers of torch's `DataLoader`) that end only when their run ends.

torch's launcher, a terminal and a scheduler send their signals to a whole process group. The run reacts by saving and
ending; its loader processes must keep working meanwhile, since the run first finishes its step, which needs their
batches, and torch raises an error in the run when a loader process dies. So loader processes are forked with these
signals blocked and keep them blocked: none of these signals can ever end them, whatever handlers torch installs.

Since SIGTERM is blocked, the parent cannot end a loader process with it either; a loader process that does not exit
by itself gets SIGKILL. The operating system also sends SIGKILL when the parent dies, even if the parent was killed:
no loader process is left behind. (To be exact, it does so when the thread that made the fork ends; in a run, this is
the main thread.)
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

from megatron_ext.config.command_line.error_lines import ProcessLost
from megatron_ext.platform.parent_process import signal_at_parents_end

HELD_BACK = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_DIED = "DataLoader worker (pid"
_SECONDS_TO_END = 5.0
_SECONDS_TO_DIE = 1.0


class _Handle(Popen):
    """The parent's handle on a loader process."""

    def _launch(self, process_obj: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            super()._launch(process_obj)  # type: ignore[misc]  # typeshed does not have it
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """Kills the process; meanwhile torch's SIGCHLD handler, which would report a failure, is switched off."""
        if threading.current_thread() is not threading.main_thread():
            self.kill()
            return
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            self.kill()
            self.wait(_SECONDS_TO_END)
        finally:
            signal.signal(signal.SIGCHLD, handler)


class _LoaderProcess(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return _Handle(process_obj)

    def run(self) -> None:
        """Runs torch's loader loop; the process ends when its parent does."""
        signal_at_parents_end(signal.SIGKILL)
        if os.getppid() != self._parent_pid:  # type: ignore[attr-defined]  # typeshed does not have it
            os._exit(1)  # the parent ended before this process had requested the signal
        super().run()


class LoaderContext(ForkContext):
    """A value for `DataLoader(multiprocessing_context=...)` that forks loader processes, whatever Python's default
    start method is.
    """

    Process = _LoaderProcess


@contextlib.contextmanager
def deaths_told_later() -> Iterator[None]:
    """Delays the error that torch raises, anywhere in this process, when a loader process has died.

    The error must not interrupt a fork (Python prints and drops an error raised in its hooks around a fork) or the
    creation of torch's iterator (torch prints a second error). It is therefore raised at the end of the block or,
    if multiprocessing has already collected the process, when the next batch of that process is awaited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers can be set in the main thread only
        return
    arrived: list[int] = []

    def note(number: int, _: object) -> None:
        arrived.append(number)

    handler = signal.signal(signal.SIGCHLD, note)
    try:
        yield
    finally:
        if (
            signal.getsignal(signal.SIGCHLD) is note
        ):  # otherwise torch has set its own handler within the block
            signal.signal(signal.SIGCHLD, handler)
    if arrived and callable(handler):
        handler(signal.SIGCHLD, None)


@contextlib.contextmanager
def loader_failures() -> Iterator[None]:
    """Turns the error that a dead loader process causes, anywhere in the block, into a one-line error.

    Raises:
        ProcessLost: a loader process has died.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        message = _death(error)
        if message is None:
            raise
        raise ProcessLost(
            f"--num-workers: {message.rstrip('.')}; lower --num-workers if memory is short; "
            "--load continues from the last checkpoint"
        ) from error


def _death(error: Exception) -> str | None:
    """Returns torch's message about the dead loader process that caused an error; None if no loader process has died.

    After a first death, later ones raise no error, because an error raised while the run ends would hide the first
    error.
    """
    message, handler = str(error).strip(), signal.getsignal(signal.SIGCHLD)
    if isinstance(error, RuntimeError):
        if not message.startswith(_DIED):
            return None
        _ignore_deaths()
        return message
    # The connection to a loader process breaks a moment before the system reports its death.
    deadline = time.monotonic() + _SECONDS_TO_DIE
    while callable(handler) and time.monotonic() < deadline:
        try:
            time.sleep(0.01)
            handler(signal.SIGCHLD, None)
        except RuntimeError as death:
            _ignore_deaths()
            return str(death).strip()
    return None


def _ignore_deaths() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
