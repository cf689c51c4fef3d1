"""A rank that stops or does something else is named by the ranks that wait for it."""

import os
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ext.platform.hosts.rank_progress import RankProgress
from megatron_ext.testing.run_distributed import run_distributed


def _progress() -> tuple[RankProgress, int, dist.TCPStore]:
    """This rank's progress over a store of rank 0's, the process id of rank 1, and the store."""
    rank = dist.get_rank()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    shared: list[int] = [server.port if server else 0, os.getpid()]
    found: list[list[int]] = [shared, shared]
    dist.all_gather_object(found, shared)
    port, pid = found[0][0], found[1][1]
    store = server or dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=30))
    own = dist.TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=timedelta(seconds=30))
    return RankProgress(own, rank, 2, patience=3.0), pid, store


def _all_reduce() -> None:
    dist.all_reduce(torch.ones(1))


def _await_finding(progress: RankProgress, found: list[str]) -> None:
    end = time.monotonic() + 60
    while not progress.finding() and time.monotonic() < end:
        time.sleep(0.05)
    found.append(progress.finding())


def _stopped() -> str:
    """What rank 0 finds about rank 1, which is stopped by SIGSTOP."""
    progress, pid, store = _progress()
    progress.start()
    rank = dist.get_rank()
    for step in range(1, 3 if rank == 0 else 2):
        progress.reach(step)
        time.sleep(0.2)
    dist.barrier()
    found: list[str] = []
    if rank == 0:
        os.kill(pid, signal.SIGSTOP)

        def wake() -> None:
            _await_finding(progress, found)
            os.kill(pid, signal.SIGCONT)

        waker = threading.Thread(target=wake)
        waker.start()
        _all_reduce()
        waker.join()
        found = [found[0].replace(f"process {pid}", "process P")]
    else:
        _all_reduce()
    progress.stop()
    dist.barrier()
    del store
    return found[0] if found else ""


def _busy() -> str:
    """What rank 0 finds about rank 1, which does something else while rank 0 waits for it."""
    progress, pid, store = _progress()
    progress.start()
    progress.reach(1)
    found: list[str] = []
    if dist.get_rank() == 0:
        watcher = threading.Thread(target=_await_finding, args=(progress, found))
        watcher.start()
        _all_reduce()
        watcher.join()
        found = [found[0].replace(f"process {pid}", "process P")]
    else:
        _await_finding(progress, [])
        _all_reduce()
    progress.stop()
    dist.barrier()
    del store
    return found[0] if found else ""


def test_a_stopped_rank_is_named_with_the_step_that_it_has_not_reached() -> None:
    text = run_distributed(_stopped, 2)[0]
    assert text.startswith("rank 1 (") and text.endswith(
        ", process P) has not reached step 2: it gives no sign of life"
    )


def test_a_rank_that_does_something_else_is_named_with_its_place() -> None:
    text = run_distributed(_busy, 2)[0]
    assert ", process P) is still in step 1, at " in text
