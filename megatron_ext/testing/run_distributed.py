"""Runs a test function in several processes that form one gloo group.

The processes are forked from a server that has already imported torch and mcore, so a test with four processes does not
import them four times. If a process fails, the test fails with its traceback, and no process is left behind.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
"""Multiprocessing context that starts processes with torch and mcore already imported."""

context.set_forkserver_preload(["megatron_ext.testing.preload"])


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0, start: Any = context
) -> list[Any]:
    """Calls `function(*args)` in `world_size` processes that form one gloo group.

    RANK, WORLD_SIZE and LOCAL_RANK are set in their environment, and the process group is initialized.

    Args:
        function: a module-level function; its result must be picklable (tensors are).
        world_size: number of processes.
        timeout: seconds after which all processes are killed.
        start: multiprocessing context that starts the processes.

    Returns:
        The results, ordered by rank.

    Raises:
        RuntimeError: a process failed (the message contains its traceback), or the time ran out.
    """
    with _started(function, world_size, args, start) as (processes, results):
        return _collect(processes, results, world_size, timeout)


def run_and_kill(function: Callable[..., Any], world_size: int, *args: Any, seconds: float) -> bool:
    """Like `run_distributed`, but kills all processes (SIGKILL) after `seconds`.

    Returns:
        True if all processes had already finished.

    Raises:
        RuntimeError: a process failed before that; the message contains its traceback.
    """
    with _started(function, world_size, args) as (processes, results):
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.exitcode is None for process in processes):
            return False
        _collect(processes, results, world_size, timeout=10.0)
        return True


@contextlib.contextmanager
def _started(
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...], start: Any = context
) -> Iterator[tuple[list[Any], Any]]:
    """Yields the running processes and the queue of their results; kills those still running when the block ends."""
    results: Any = start.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            start.Process(
                target=_run_rank, args=(function, rank, world_size, folder, args, results), daemon=False
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            yield processes, results
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(processes: list[Any], results: Any, world_size: int, timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(found) < world_size:
        try:
            rank, error, result = results.get(timeout=0.2)
        except queue.Empty:
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead and results.empty():  # if not empty, the traceback has just arrived: read it first
                raise RuntimeError(f"a process died with exit code {dead[0]}") from None
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"no result within {timeout:.0f} s from {world_size - len(found)} of {world_size} ranks"
                ) from None
            continue
        if error:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        found[rank] = pickle.loads(result)
    return [found[rank] for rank in range(world_size)]


def _run_rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...], results: Any
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)  # several processes share the cores
        store = dist.FileStore(str(Path(folder, "rendezvous")), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        # The queue would pass tensors through shared memory, which disappears with this process.
        result = pickle.dumps(function(*args))
        dist.barrier()
        results.put((rank, None, result))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
