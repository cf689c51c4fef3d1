"""Worker processes for a stream of tasks, whose death is noticed at once.

`multiprocessing.Pool` waits for ever when a worker is killed, and its task queue has no bound. Here every
worker has a pipe of its own and one task at a time, and the parent waits on the pipes and on the processes
themselves. A worker whose parent dies reads the end of its pipe and leaves.

Workers are forked where this process has a single thread: they start at once with all that is loaded (Python, numpy,
the tokenizer), which would else cost each of them a third of a second. Threads do not survive a fork, so with several
workers are spawned and load everything themselves.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol

Report = Callable[[Any], None]
TaskFunction = Callable[[Any, Report], Any]
StartMethod = Literal["fork", "spawn"]
_STOPPING = (signal.SIGINT, signal.SIGTERM)


class Closable(Protocol):
    """An open file or connection."""

    def close(self) -> None:
        """Closes it."""


class WorkerDied(RuntimeError):
    """A worker process ended without being told to (killed, out of memory)."""


class WorkerBug(RuntimeError):
    """A worker raised what is not a user's mistake; the message holds its traceback."""


@dataclass(frozen=True)
class WorkerProgress:
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


def start_method() -> StartMethod:
    """Returns how to start workers: by fork where this process is known to have one thread."""
    try:
        return "fork" if len(os.listdir("/proc/self/task")) == 1 else "spawn"
    except OSError:  # a system without /proc
        return "spawn"


class WorkerPool:
    """Processes that each run `make_worker(argument)` once and then the function it returns for every task.

    Args:
        make_worker: importable; called in the worker, returns `function(task, report) -> result`.
        argument: given to `make_worker`; a forked worker inherits it, a spawned one gets a pickled copy.
        size: number of processes.
        passed_on: kinds of exception that come back as `Failed`; others end the run with `WorkerBug`.
        parents_own: open files that workers must not hold (a lock lives as long as any process holds its file).
        method: how workers are started.
    """

    def __init__(
        self,
        make_worker: Callable[[Any], TaskFunction],
        argument: Any,
        size: int,
        passed_on: tuple[type[Exception], ...],
        *,
        parents_own: Sequence[Closable] = (),
        method: StartMethod | None = None,
    ) -> None:
        method = method or start_method()
        context = multiprocessing.get_context(method)
        self._processes: dict[Connection, Any] = {}
        self._running: dict[Connection, Any] = {}
        self._idle: list[Connection] = []
        if method == "spawn":
            resource_tracker.ensure_running()  # its start would lift the signals' block
        with _signals_blocked():
            for _ in range(size):
                ours, theirs = context.Pipe()
                # The parent's ends in a worker would keep the pipes open after the parent's death.
                inherited = [*parents_own, *self._processes, ours] if method == "fork" else []
                arguments = (make_worker, argument, theirs, passed_on, inherited)
                process = context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
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

    def wait(self, timeout: float) -> list[WorkerProgress | Done | Failed]:
        """Returns what the workers said since the last call, after at most `timeout` seconds.

        Raises:
            WorkerDied: a worker ended.
            WorkerBug: a worker raised something that is not passed on.
        """
        sentinels = {process.sentinel: connection for connection, process in self._processes.items()}
        ready = wait([*self._processes, *sentinels], timeout)
        messages: list[WorkerProgress | Done | Failed] = []
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

    def _message(self, connection: Any, kind: str, value: Any) -> WorkerProgress | Done | Failed:
        if kind == "progress":
            return WorkerProgress(value)
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
            process.kill()
            connection.close()
        for process in self._processes.values():
            process.join()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back; a process started within begins its life so, until `_work` ignores them."""
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
    for number in _STOPPING:  # they reach the whole group, and the parent, which has to tell of it, ends us
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    try:
        for file in inherited:
            file.close()
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
