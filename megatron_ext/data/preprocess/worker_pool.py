"""Worker processes for a stream of tasks, whose death is noticed at once.

`multiprocessing.Pool` waits for ever when a worker is killed, and its task queue has no bound. Here every
worker has a pipe of its own and one task at a time, and the parent waits on the pipes and on the processes
themselves. Workers are spawned, not forked: the tokenizers' thread pools do not survive a fork. A worker whose
parent dies reads the end of its pipe and leaves.
"""

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

Report = Callable[[Any], None]
TaskFunction = Callable[[Any, Report], Any]


class WorkerDied(RuntimeError):
    """A worker process ended without being told to (killed, out of memory)."""


class WorkerBug(RuntimeError):
    """A worker raised what is not a user's mistake; the message holds its traceback."""


@dataclass(frozen=True)
class Progress:
    """A report of a running task."""

    value: Any


@dataclass(frozen=True)
class Done:
    """The result of a task."""

    task: Any
    result: Any


@dataclass(frozen=True)
class Failed:
    """An exception of the kinds that the pool passes on."""

    task: Any
    error: Exception


class WorkerPool:
    """Spawned processes that each run `make_worker(argument)` once and then the function it returns for every task.

    Args:
        make_worker: importable; called in the worker, returns `function(task, report) -> result`.
        argument: given to `make_worker`.
        size: number of processes.
        passed_on: kinds of exception that come back as `Failed`; others end the run with `WorkerBug`.
    """

    def __init__(
        self,
        make_worker: Callable[[Any], TaskFunction],
        argument: Any,
        size: int,
        passed_on: tuple[type[Exception], ...],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, Any] = {}
        self._running: dict[Connection, Any] = {}
        self._idle: list[Connection] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(make_worker, argument, theirs, passed_on), daemon=True
            )
            process.start()
            theirs.close()
            self._processes[ours] = process
            self._idle.append(ours)

    @property
    def num_idle(self) -> int:
        """Workers without a task."""
        return len(self._idle)

    @property
    def num_running(self) -> int:
        """Tasks that have not come back."""
        return len(self._running)

    def submit(self, task: Any) -> None:
        """Gives a task to an idle worker."""
        connection = self._idle.pop()
        self._running[connection] = task
        try:
            connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(connection) from None

    def wait(self, timeout: float) -> list[Progress | Done | Failed]:
        """Returns what the workers said since the last call, after at most `timeout` seconds.

        Raises:
            WorkerDied: a worker ended.
            WorkerBug: a worker raised something that is not passed on.
        """
        sentinels = {process.sentinel: connection for connection, process in self._processes.items()}
        ready = wait([*self._processes, *sentinels], timeout)
        messages: list[Progress | Done | Failed] = []
        for connection in [item for item in ready if item in self._processes]:
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._death(connection) from None
            messages.append(self._message(connection, kind, value))
        dead = [sentinels[item] for item in ready if item in sentinels]
        if dead and not messages:
            raise self._death(dead[0])
        return messages

    def _message(self, connection: Any, kind: str, value: Any) -> Progress | Done | Failed:
        if kind == "progress":
            return Progress(value)
        if kind == "bug":
            raise WorkerBug(value)
        if connection not in self._running:
            raise WorkerBug(f"a worker answered without a task: {value}")
        task = self._running.pop(connection)
        self._idle.append(connection)
        return Done(task, value) if kind == "done" else Failed(task, value)

    def _death(self, connection: Any) -> WorkerDied:
        process = self._processes[connection]
        process.join(5)
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        task = self._running.get(connection)
        return WorkerDied(
            f"worker process {process.pid} ended unexpectedly ({how})" + (f" at {task}" if task else "")
        )

    def close(self) -> None:
        """Ends all workers now, whatever they do."""
        for connection, process in self._processes.items():
            process.terminate()
            connection.close()
        for process in self._processes.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _work(
    make_worker: Callable[[Any], TaskFunction],
    argument: Any,
    connection: Connection,
    passed_on: tuple[type[Exception], ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    try:
        function = make_worker(argument)
        while True:
            task = connection.recv()
            try:
                answer = ("done", function(task, lambda value: connection.send(("progress", value))))
            except passed_on as error:
                answer = ("failed", error)
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("bug", traceback.format_exc()))
