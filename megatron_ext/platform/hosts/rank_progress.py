"""Finds the rank that all others wait for when a run makes no progress, and names it before collectives time out.

A thread of every rank writes to the store through which the processes have met. At the beginning of a step, and every
two seconds, it writes the step and the current place of the main thread. If a step lasts longer than half of
`--distributed-timeout-minutes`, the first rank that notices this reads the entries of all ranks, twice, and compares:

    the rank is in an earlier step   rank 5 (host2, process 71) has not reached step 120: it is in step 119, at ...
    its thread writes nothing new    rank 5 (host2, process 71) has stopped in step 120: it gives no sign of life
    it computes, all others wait     rank 5 (host2, process 71) is still in step 120, at ...

The main thread waits neither for the store nor for the device; a step costs one small message.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from megatron_ext.config.command_line.error_lines import ProcessLost
from megatron_ext.platform.collectives import on_first_rank

_SECONDS = 2.0
"""Seconds between two signs of life."""

_STORE_SECONDS = 30.0
"""Seconds after which a store that does not answer counts as lost."""

_WAITING = ("/torch/distributed/", "/megatron/core/pipeline_parallel/", "/megatron/core/distributed/")
"""Parts of file paths; a main thread in one of these files waits for other ranks."""

_TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")
"""Texts in gloo's messages after a timeout."""


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """The entry that a rank writes to the store."""

    host: str
    pid: int
    begun: int = 0
    """Number of steps that this process has begun."""

    step: int = 0
    """The current training step, from 1; 0 before the first."""

    beat: int = 0
    """Number of signs of life so far."""

    place: str = ""
    """Current file and line of the main thread."""

    waits: bool = False
    """Whether the main thread waits for other ranks at `place`."""

    still: float = 0.0
    """Seconds that the main thread has been at `place`."""


class RankProgress:
    """Writes this rank's progress, and watches the progress of all ranks."""

    def __init__(self, store: Any, rank: int, world_size: int, *, patience: float) -> None:
        """Args:
        store: the store of all ranks, through a connection that no other code uses.
        rank: this rank.
        world_size: number of ranks.
        patience: seconds that a step may last before the ranks are compared.
        """
        self._store, self._rank, self._world_size, self._patience = store, rank, world_size, patience
        self._begun, self._step, self._since = 0, 0, time.monotonic()
        self._answered, self._finding = self._since, ""
        self._before: tuple[int, float, dict[int, RankStatus]] | None = None
        self._seen: tuple[int, int, float] = (0, 0, self._since)
        self._main = threading.main_thread().ident
        self._news, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="rank progress", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._ended = True
        self._news.set()
        self._thread.join(_SECONDS)  # limited, because the store may not answer

    def reach(self, step: int) -> None:
        """Records that this rank begins a step."""
        self._begun, self._step, self._since = self._begun + 1, step, time.monotonic()
        self._news.set()

    def finding(self) -> str:
        """Returns a text that names the rank the run waits for; empty if no rank has found it."""
        if time.monotonic() - self._answered > _STORE_SECONDS:
            return "rank 0, or the launcher of its host, does not answer"
        return self._finding

    def _run(self) -> None:
        beat, compared = 0, 0
        with contextlib.suppress(RuntimeError):  # the store no longer exists
            while not self._ended:
                beat += 1
                self._news.clear()
                self._store.set(str(self._rank), json.dumps(asdict(self._status(beat))))
                periods = int((time.monotonic() - self._since) / self._patience)
                if periods not in (0, compared) and self._before is None and self._claim(periods):
                    self._before = self._begun, time.monotonic(), self._statuses()
                compared = periods
                self._compare()
                self._finding = (self._read("finding") or "") if periods else ""
                self._answered = time.monotonic()
                self._news.wait(_SECONDS)

    def _claim(self, period: int) -> bool:
        """Returns whether this rank is the first to investigate this delay."""
        return bool(self._store.add(f"claim/{self._begun}/{period}", 1) == 1)

    def _compare(self) -> None:
        """If this rank read the entries of all ranks some seconds ago, compares them with the current entries."""
        if self._before is None:
            return
        begun, taken, before = self._before
        if self._begun == begun and time.monotonic() - taken < 3 * _SECONDS:
            return  # return to give signs of life in the meantime, because another rank may also be comparing
        self._before = None
        culprits = find_culprits(before, self._statuses(), self._patience / 2) if self._begun == begun else []
        if culprits:
            text = "; ".join(culprits)
            self._store.set("finding", json.dumps(text))
            seconds = time.monotonic() - self._since
            print(f"warning: no progress for {seconds:.0f} s: {text}", file=sys.stderr, flush=True)

    def _status(self, beat: int) -> RankStatus:
        frame = sys._current_frames().get(self._main or 0)
        last, now = self._seen, time.monotonic()
        here = (id(frame), 0 if frame is None else frame.f_lasti)
        self._seen = last if last[:2] == here else (*here, now)
        return RankStatus(
            host=socket.gethostname(),
            pid=os.getpid(),
            begun=self._begun,
            step=self._step,
            beat=beat,
            place=_place(frame),
            waits=frame is not None and any(part in frame.f_code.co_filename for part in _WAITING),
            still=now - self._seen[2],
        )

    def _statuses(self) -> dict[int, RankStatus]:
        """Returns the status of every rank that has written an entry."""
        found = {rank: self._read(str(rank)) for rank in range(self._world_size)}
        return {rank: RankStatus(**status) for rank, status in found.items() if status is not None}

    def _read(self, key: str) -> Any:
        """Returns a value without waiting; None if it has not been written."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def find_culprits(before: Mapping[int, RankStatus], now: Mapping[int, RankStatus], stuck: float) -> list[str]:
    """Returns a text for each rank that the others wait for.

    Args:
        before: every rank's status some seconds ago.
        now: every rank's status.
        stuck: seconds in one place after which a waiting rank counts as waiting for another rank.
    """
    newest = max(status.begun for status in now.values())
    step = next(status.step for status in now.values() if status.begun == newest)
    behind, still = [], []
    for rank, status in now.items():
        who = f"rank {rank} ({status.host}, process {status.pid})"
        silent = rank in before and before[rank].beat == status.beat
        place = "it gives no sign of life" if silent else f"it is in step {status.step}, at {status.place}"
        if status.begun < newest:
            behind.append(f"{who} has not reached step {step}: {place}")
        elif silent:
            behind.append(f"{who} has stopped in step {step}: {place}")
        elif not status.waits:
            still.append(f"{who} is still in step {step}, at {status.place}")
    waiting = any(status.waits and status.still >= stuck for status in now.values())
    return behind or (still if waiting else [])


progress: RankProgress | None = None
"""This process's progress; None if there are no other ranks."""


def reach(step: int) -> None:
    """Records that this rank begins a step."""
    if progress is not None:
        progress.reach(step)


@contextlib.contextmanager
def watch_ranks(timeout_minutes: int) -> Iterator[None]:
    """Names the rank that all others wait for if the block makes no progress; there must be a process group.

    Raises:
        ProcessLost: a collective has timed out.
    """
    global progress
    progress = _join(60.0 * timeout_minutes / 2)
    if progress is None:
        yield
        return
    progress.start()
    try:
        yield
    except RuntimeError as error:
        if any(text in str(error) for text in _TIMED_OUT):
            finding = progress.finding() or "the rank could not be identified"
            raise ProcessLost(
                f"rank {dist.get_rank()} waited {timeout_minutes} minutes "
                "(--distributed-timeout-minutes) for another "
                f"rank: {finding}"
            ) from error
        raise
    finally:
        progress.stop()
        progress = None


def _join(patience: float) -> RankProgress | None:
    """Returns this rank's progress, with its own connection to the store; None if there are no other processes."""
    if "MASTER_ADDR" not in os.environ or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=_STORE_SECONDS),
    )
    # After torchrun has restarted all processes, the store may be the same, and hosts may count restarts differently.
    own = dist.PrefixStore(f"rank_progress/{on_first_rank(lambda: uuid4().hex)}", store)
    return RankProgress(own, dist.get_rank(), dist.get_world_size(), patience=patience)


def _place(frame: FrameType | None) -> str:
    """Returns the file and line of the innermost frame in this package, starting at `frame`; of `frame` if none is."""
    inner = frame
    while frame is not None and "megatron_ext" not in Path(frame.f_code.co_filename).parts:
        frame = frame.f_back
    found = frame or inner
    if found is None:
        return "an unknown place"
    return f"{'/'.join(Path(found.f_code.co_filename).parts[-2:])}:{found.f_lineno}"
