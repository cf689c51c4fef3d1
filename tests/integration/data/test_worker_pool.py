"""Worker processes: results, failures, deaths and defects; nothing waits for ever."""

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from megatron_ext.data.preprocess.worker_pool import WorkerBug, WorkerDied, WorkerPool


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


def collect(pool: WorkerPool, tasks: list[Any]) -> tuple[list[Any], list[Any]]:
    """Pairs of task and result, and reports, until all tasks have a result."""
    todo = iter(tasks)
    results: list[Any] = []
    reports: list[Any] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        while pool.num_idle and (task := next(todo, None)) is not None:
            pool.submit(task)
        if not pool.num_running:
            return results, reports
        for found, new in zip((results, reports), pool.wait(0.2), strict=True):
            found += new
    raise AssertionError("the pool did not answer")


def test_every_task_has_one_result_or_failure_and_its_reports_arrive() -> None:
    pool = WorkerPool(make_worker, 10, 2, (ValueError,))
    try:
        results, reports = collect(pool, [*range(40), -5])
    finally:
        pool.close()
    (failed,) = [pair for pair in results if pair[0] == -5]
    results.remove(failed)
    assert sorted(results) == [(i, 10 * i) for i in range(40)]
    assert sorted(reports) == list(range(40))
    assert (type(failed[1]), str(failed[1])) == (ValueError, "negative: -5")


@pytest.mark.parametrize(
    ("worker", "task", "error", "message"),
    [
        (make_worker, "kill", WorkerDied, r"ended unexpectedly \(signal SIGKILL\) at kill"),
        (make_worker, "exit", WorkerDied, r"ended unexpectedly \(exit code 7\) at exit"),
        (make_worker, "bug", WorkerBug, "ZeroDivisionError: a defect"),
        (broken_worker, 1, WorkerBug, "RuntimeError: cannot start"),
    ],
)
def test_a_worker_that_dies_or_breaks_is_an_error(worker: Any, task: Any, error: Any, message: str) -> None:
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
