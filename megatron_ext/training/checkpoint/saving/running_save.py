"""Runs the parts of a save one after the other, either directly or in the background of later steps.

A save is a generator of parts. Each part is a function that a rank runs without waiting for other ranks; the code
between two parts is collective. In the background, a part runs in a thread that takes part in no collective, so that
the collectives of a save never mix with those of training. Between two steps, the ranks check whether all of them
have finished the part; if so, they run the code after it together.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

from megatron_ext.platform.collectives import gather_or_raise, holds_on_every_rank

Part = Callable[[], Any]
"""A function that a rank runs; must not wait for other ranks."""

Parts = Generator[Part, list[Any], None]
"""A generator that yields the parts of a save, and receives each part's results on all ranks. The code between two
parts is collective.
"""

_NICE = 15
"""Added to the thread's niceness, so that it uses only time that training leaves: if all cores are busy, Linux gives
the thread about 3 % of a core.
"""


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
    """Runs a part on every rank, sends the results to the generator, and returns the next part."""
    try:
        results = gather_or_raise(run)
    except Exception as error:
        return parts.throw(error)  # the generator cleans up and raises an error
    return parts.send(results)


class RunningSave:
    """A save that runs while training continues."""

    def __init__(self, parts: Parts) -> None:
        """Runs the code before the first part, and starts the first part in the background. Collective."""
        self._parts = parts
        self._thread = _Thread(next(parts))

    def proceed(self, *, wait: bool) -> bool:
        """Continues with the next part if every rank has finished the current one. Collective.

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
        """Cancels the save on this rank at any point; not collective."""
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
        """Waits for the function; returns its result, or raises its exception."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._returned[0]

    def _run(self) -> None:
        if sys.platform == "linux":  # on other systems, all threads of a process have the same priority
            with contextlib.suppress(OSError):
                thread = threading.get_native_id()
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
        try:
            self._returned.append(self._part())
        except BaseException as error:
            self._error = error
