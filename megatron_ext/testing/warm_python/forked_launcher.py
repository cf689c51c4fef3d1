"""Starts `torchrun` and its ranks as forks of processes that have already imported torch and megatron-core.

The command runs in a fork of the server that `run_distributed` uses. If the command is torch's launcher, its ranks
are forks of the launcher. Process tree, sessions, signals, streams and exit codes are the same as with the real
command. A test of the imports, or of what a new interpreter does, must start the real command.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from megatron_ext.testing.forked_scripts import become_command
from megatron_ext.testing.run_distributed import context
from megatron_ext.testing.torchrun import ROOT, environment

LAUNCHER = "torch.distributed.run"
"""The module that `torchrun` runs."""

_STREAMS = (("r", "strict"), ("w", "strict"), ("w", "backslashreplace"))
"""Mode and error handler of standard input, output and error."""


class ForkedCommand:
    """A Python command that runs in a fork and in its own session; has the attributes of `Popen` that `run_until`
    uses.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=_run_command, args=(list(command[1:]), environment(), writer))
        self._process.start()
        writer.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stdout: IO[str] = open(self._reader.fileno(), encoding="utf-8", closefd=False)  # noqa: SIM115

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the command runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns `returncode`."""
        return self.returncode

    def kill(self) -> None:
        """Sends SIGKILL to the command."""
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Waits until the command and all processes that write to its output have ended; returns the unread output.

        Raises:
            TimeoutExpired: not all of them have ended within `timeout` seconds.
        """
        read: list[str] = []
        reading = threading.Thread(target=lambda: read.append(self.stdout.read()), daemon=True)
        reading.start()
        reading.join(timeout)
        if not read:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        self._process.join()
        return read[0], None

    def __enter__(self) -> "ForkedCommand":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()
        self._reader.close()


class _ForkedRank:
    """A rank of a forked launcher; has the attributes of `subprocess.Popen` that torch's launcher uses."""

    def __init__(
        self,
        *,
        args: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[str] | None,
        stderr: IO[str] | None,
        start_new_session: bool,
    ) -> None:
        assert start_new_session
        sys.stdout.flush()
        sys.stderr.flush()
        self._process = get_context("fork").Process(target=_run_rank, args=(args[1:], env, stdout, stderr))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self._process.exitcode


def run_python(arguments: Sequence[str], variables: Mapping[str, str], folder: str | Path) -> None:
    """Does the same as `python ARGUMENTS`, in this forked process.

    The arguments are -u (optional), then -m MODULE or a script, then the arguments of the module or script.
    """
    first, *rest = arguments[1:] if arguments[0] == "-u" else arguments
    _open_streams()
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    with become_command(variables, folder):
        if first == "-m":
            sys.argv = rest
            sys.path.insert(0, str(folder))
            if rest[0] in (LAUNCHER, "megatron_ext.platform.hosts.launch"):
                _fork_ranks()
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")


def _fork_ranks() -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    handler: Any = subprocess_handler
    handler.Popen = _ForkedRank


def _run_command(arguments: list[str], variables: dict[str, str], output: Connection) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    run_python(arguments, variables, ROOT)


def _run_rank(
    arguments: Sequence[str], variables: Mapping[str, str], stdout: IO[str] | None, stderr: IO[str] | None
) -> None:
    os.setsid()
    _forget_launcher()
    for number, stream in ((1, stdout), (2, stderr)):
        if stream is not None:
            os.dup2(stream.fileno(), number)
    run_python(arguments, variables, os.getcwd())


def _forget_launcher() -> None:
    """Removes the launcher's signal handlers and sockets, which a new program would not inherit."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in os.listdir("/proc/self/fd"):
        path = Path("/proc/self/fd", name)
        if int(name) > 2 and path.exists() and os.readlink(path).startswith("socket:"):
            os.close(int(name))


def _open_streams() -> None:
    """Opens the standard streams again, because the server's streams were opened for other files."""
    sys.stdin, sys.stdout, sys.stderr = (
        open(descriptor, mode, buffering=1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        for descriptor, (mode, errors) in enumerate(_STREAMS)
    )
