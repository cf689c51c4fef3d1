"""Runs a test function in several processes that form one gloo group.

The processes are forked from a server that has imported torch and the engine once, so that a test with four processes
costs a fork, not four imports. A process that fails or dies ends the test with its traceback; none is left behind.
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
"""Makes processes that have torch and the engine imported."""

context.set_forkserver_preload(["megatron_ext.testing.preload"])


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Any]:
    """Calls `function(*args)` in `world_size` processes that share one torch.distributed environment.

    The processes find RANK, WORLD_SIZE, LOCAL_RANK in their environment and an initialised gloo process group.

    Args:
        function: a module-level function; its result must be picklable (tensors are fine).
        world_size: number of processes.
        timeout: seconds after which all processes are killed.

    Returns:
        The results in the order of ranks.

    Raises:
        RuntimeError: a process failed; the message holds its traceback.
    """
    with _started(function, world_size, args) as (processes, results):
        return _collect(processes, results, world_size, timeout)


def run_and_kill(function: Callable[..., Any], world_size: int, *args: Any, seconds: float) -> bool:
    """As `run_distributed`, but all processes are killed (SIGKILL) after `seconds`.

    Returns:
        True where they had finished before.

    Raises:
        RuntimeError: a process failed before; the message holds its traceback.
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
    function: Callable[..., Any], world_size: int, args: tuple[Any, ...]
) -> Iterator[tuple[list[Any], Any]]:
    """The processes, and the queue of their results; within it they run, afterwards they are gone."""
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
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
            if dead and results.empty():  # else it has left its traceback just now
                raise RuntimeError(f"a process died with exit code {dead[0]}") from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"no result within {timeout:.0f} s") from None
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

        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder, "rendezvous")), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        # Pickled here, not by the queue: that would pass tensors through shared memory which ends with this process.
        result = pickle.dumps(function(*args))
        dist.barrier()
        results.put((rank, None, result))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None
