"""Worker processes: results, failures, deaths and defects; nothing waits for ever."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from megatron_ext.data.preprocess.worker_pool import (
    Done,
    Failed,
    WorkerBug,
    WorkerDied,
    WorkerPool,
    WorkerProgress,
)


def make_worker(argument: int) -> Any:
    def function(task: Any, report: Any) -> Any:
        if task == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "exit":
            os._exit(7)
        if task == "bug":
            raise ZeroDivisionError("a defect")
        if task < 0:
            raise ValueError(f"negative: {task}")
        report(task)
        return task * argument

    return function


def broken_worker(argument: int) -> Any:
    raise RuntimeError("cannot start")


def collect(pool: WorkerPool, tasks: list[Any]) -> list[Any]:
    """Everything the workers say until all tasks are answered."""
    todo = iter(tasks)
    messages: list[Any] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        while pool.num_idle and (task := next(todo, None)) is not None:
            pool.submit(task)
        if not pool.num_running:
            return messages
        messages += pool.wait(0.2)
    raise AssertionError("the pool did not answer")


def test_every_task_is_answered_once_with_its_result_failure_or_progress() -> None:
    pool = WorkerPool(make_worker, 10, 2, (ValueError,))
    try:
        messages = collect(pool, [*range(40), -5])
    finally:
        pool.close()
    assert sorted(m.result for m in messages if isinstance(m, Done)) == [10 * i for i in range(40)]
    assert sorted(m.value for m in messages if isinstance(m, WorkerProgress)) == list(range(40))
    ((failed),) = [m for m in messages if isinstance(m, Failed)]
    assert (failed.task, str(failed.error)) == (-5, "negative: -5")


@pytest.mark.parametrize(
    ("worker", "task", "error", "message"),
    [
        (make_worker, "kill", WorkerDied, "signal SIGKILL"),
        (make_worker, "exit", WorkerDied, "exit code 7"),
        (make_worker, "bug", WorkerBug, "ZeroDivisionError: a defect"),
        (broken_worker, 1, WorkerBug, "RuntimeError: cannot start"),
    ],
)
def test_a_worker_that_dies_or_breaks_ends_the_run(worker: Any, task: Any, error: Any, message: str) -> None:
    pool = WorkerPool(worker, 10, 2, (ValueError,))
    try:
        with pytest.raises(error, match=message):
            collect(pool, [task])
    finally:
        pool.close()


def test_workers_are_forked_by_a_process_of_one_thread_alone() -> None:
    script = """
import threading
from megatron_ext.data.preprocess.worker_pool import start_method

print(start_method())
end = threading.Event()
threading.Thread(target=end.wait).start()
print(start_method())
end.set()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["fork" if sys.platform == "linux" else "spawn", "spawn"]
