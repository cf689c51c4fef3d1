"""Worker processes for a stream of tasks; if a worker dies, the parent immediately raises an error naming its task.

`multiprocessing.Pool` waits forever for a killed worker. `concurrent.futures.ProcessPoolExecutor` does not report the
task of a killed worker, lets running tasks end before it stops, and leaves workers behind if the parent is killed.
Here every worker has its own pipe and one task at a time: the parent sees the pipe close when the worker dies, and
the worker sees it close when the parent dies.

Workers are forked if this process has a single thread. They then start with Python, numpy and the tokenizer already
loaded; loading these would take each worker a third of a second. Threads do not survive a fork, so a process
with several threads spawns its workers, which load everything themselves.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol

Report = Callable[[Any], None]
TaskFunction = Callable[[Any, Report], Any]
_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Closable(Protocol):
    """An open file or connection."""

    def close(self) -> None:
        """Closes the file or connection."""


class WorkerDied(RuntimeError):
    """A worker process ended although the parent had not ended it (it was killed, or ran out of memory)."""


class WorkerBug(RuntimeError):
    """A worker raised an exception that no input should cause; the message holds its traceback."""


def start_method() -> Literal["fork", "spawn"]:
    """Returns how to start workers: "fork" if this process is known to have only one thread, otherwise "spawn"."""
    try:
        return "fork" if len(os.listdir("/proc/self/task")) == 1 else "spawn"
    except OSError:  # a system without /proc
        return "spawn"


class WorkerPool:
    """Processes that each run `make_worker(argument)` once and then the function it returns for every task.

    Args:
        make_worker: an importable function, called in the worker; returns `function(task, report) -> result`.
        argument: given to `make_worker`; a forked worker inherits it, a spawned one gets a pickled copy.
        size: number of processes.
        passed_on: exception classes whose exceptions are returned as a task's result; any other exception raises
            `WorkerBug`.
        parents_own: open files that workers must not hold (a lock lives as long as any process holds its file).
    """

    def __init__(
        self,
        make_worker: Callable[[Any], TaskFunction],
        argument: Any,
        size: int,
        passed_on: tuple[type[Exception], ...],
        *,
        parents_own: Sequence[Closable] = (),
    ) -> None:
        method = start_method()
        context = multiprocessing.get_context(method)
        self._processes: dict[Connection, Any] = {}
        self._running: dict[Connection, Any] = {}
        if method == "spawn":
            resource_tracker.ensure_running()  # starting it later would unblock the signals
        with _signals_blocked():
            for _ in range(size):
                ours, theirs = context.Pipe()
                # If a worker kept the parent's ends, the pipes would stay open after the parent's death.
                inherited = [*parents_own, *self._processes, ours] if method == "fork" else []
                arguments = (make_worker, argument, theirs, passed_on, inherited)
                process = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
                process.start()
                theirs.close()  # so that the pipe closes when the worker dies
                self._processes[ours] = process
        self._idle = list(self._processes)

    @property
    def num_idle(self) -> int:
        """Number of workers without a task."""
        return len(self._idle)

    @property
    def num_running(self) -> int:
        """Number of tasks without a result."""
        return len(self._running)

    def submit(self, task: Any) -> None:
        """Gives a task to an idle worker."""
        connection = self._idle.pop()
        self._running[connection] = task
        try:
            connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(connection) from None

    def wait(self, timeout: float) -> tuple[list[tuple[Any, Any]], list[Any]]:
        """Waits at most `timeout` seconds for messages; returns (task, result) pairs and values reported by tasks.

        Raises:
            WorkerDied: a worker process ended.
            WorkerBug: a worker raised an exception that is not one of `passed_on`.
        """
        results, reports = [], []
        ready: list[Any] = wait(self._processes, timeout)
        for connection in ready:
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._death(connection) from None
            if kind == "bug":
                raise WorkerBug(value)
            if kind == "report":
                reports.append(value)
            else:
                results.append((self._running.pop(connection), value))
                self._idle.append(connection)
        return results, reports

    def _death(self, connection: Any) -> WorkerDied:
        process = self._processes[connection]
        process.join(5)  # the pipe ends a moment before the exit code is known
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        task = self._running.get(connection)
        return WorkerDied(
            f"worker process {process.pid} ended unexpectedly ({how})" + (f" at {task}" if task else "")
        )

    def close(self) -> None:
        """Kills all workers, even those that are running a task."""
        for connection, process in self._processes.items():
            process.kill()
            connection.close()
        for process in self._processes.values():
            process.join()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM. Processes started inside the block inherit this, until `_work` makes them ignore the
    signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    make_worker: Callable[[Any], TaskFunction],
    argument: Any,
    connection: Connection,
    passed_on: tuple[type[Exception], ...],
    inherited: Sequence[Closable],
) -> None:
    for number in (
        _STOPPING
    ):  # these signals reach the whole process group; the parent handles them and kills this process
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    try:
        for file in inherited:
            file.close()
        function = make_worker(argument)
        while True:
            task = connection.recv()
            try:
                result = function(task, lambda value: connection.send(("report", value)))
            except passed_on as error:
                result = error
            connection.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("bug", traceback.format_exc()))
