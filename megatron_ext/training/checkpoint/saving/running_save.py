"""Runs the parts of a save, one after the other, in the step that saves or beside the steps that follow.

A save is a generator of parts. Each part is a function that one rank runs without waiting for the others; what lies
between two parts is collective. In the background a part runs in a thread, which takes part in no collective, so that
none of a save's falls between those of training: between two steps the ranks agree on whether all have run the part,
and then run together what follows it.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

from megatron_ext.platform.collectives import gather_or_raise, holds_on_every_rank

Part = Callable[[], Any]
"""What one rank does; must not wait for other ranks."""

Parts = Generator[Part, list[Any], None]
"""Yields the parts of a save, and receives what each returned on every rank. The code between two is collective."""

_NICE = 15
"""Added to the thread's niceness, so that it takes the time that training leaves: where all cores are busy, Linux gives
it about 3 % of one."""


def run_parts(parts: Parts) -> None:
    """Runs a save to its end. Collective.

    Raises:
        OSError: a part failed on some rank; raised on every rank.
    """
    with contextlib.suppress(StopIteration):
        part = next(parts)
        while True:
            part = _proceed(parts, part)


def _proceed(parts: Parts, run: Part) -> Part:
    """Runs a part on every rank, hands the results to the generator, and returns the next part."""
    try:
        results = gather_or_raise(run)
    except Exception as error:
        return parts.throw(error)  # the generator cleans up, and raises
    return parts.send(results)


class RunningSave:
    """A save that goes on while training does."""

    def __init__(self, parts: Parts) -> None:
        """Runs what comes before the first part, and starts that one in the background. Collective."""
        self._parts = parts
        self._thread = _Thread(next(parts))

    def proceed(self, *, wait: bool) -> bool:
        """Continues with the next part if every rank has run the present one. Collective.

        Args:
            wait: whether to wait for the end of the save.

        Returns:
            Whether the save is complete.

        Raises:
            OSError: a part failed on some rank; raised on every rank.
        """
        while wait or holds_on_every_rank(self._thread.is_done()):
            try:
                self._thread = _Thread(_proceed(self._parts, self._thread.result))
            except StopIteration:
                return True
        return False

    def give_up(self) -> None:
        """Ends the save on this rank, wherever it is; not collective."""
        self._parts.close()
        self._thread.join()


class _Thread:
    """Runs a function in a thread of low priority."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._returned: list[Any] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint")
        self._thread.start()

    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def result(self) -> Any:
        """Waits for the function; returns what it returned, or raises what it raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._returned[0]

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere a process has one priority for all its threads
            with contextlib.suppress(OSError):
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
        try:
            self._returned.append(self._part())
        except BaseException as error:
            self._error = error
