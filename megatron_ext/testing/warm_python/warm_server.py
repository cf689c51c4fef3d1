"""Starts and is the process from which the commands of `warm_client` are forked.

For tests of shell scripts that start Python a dozen times. Tests of the launcher, of signals or of imports must use the
real interpreter.
"""

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_ext.testing.forked_scripts import become_command
from megatron_ext.testing.run_distributed import context

_STREAMS = (("r", "strict"), ("w", "strict"), ("w", "backslashreplace"))
"""Mode and error handler of standard input, output and error."""


@functools.cache
def warm_python() -> str:
    """Returns the path of an executable that runs Python commands as `sys.executable` does, but starts at once."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    lifeline, held = multiprocessing.Pipe(duplex=False)
    context.Process(target=_serve, args=(listener, lifeline)).start()
    listener.close()
    atexit.register(held.close)  # the server then ends
    client = [sys.executable, "-I", "-S", str(Path(__file__).with_name("warm_client.py"))]
    executable = folder / "python"
    executable.write_text(
        f'#!/bin/sh\nexec {shlex.join(client)} {folder / "socket"} "$@"\n', encoding="utf-8"
    )
    executable.chmod(0o755)
    return str(executable)


def warm_variables() -> dict[str, str]:
    """Returns the variables by which the example scripts and torch's launcher start `warm_python`."""
    return dict.fromkeys(("PYTHON", "PYTHON_EXEC"), warm_python())


def _serve(listener: socket.socket, lifeline: Connection) -> None:
    """Forks a process for each command, until the process that started this one ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then removes processes that have ended
    while lifeline not in wait([listener, lifeline]):
        client, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            lifeline.close()
            with contextlib.suppress(BrokenPipeError):  # the client was killed
                _run_for(client)
            os._exit(0)
        client.close()


def _run_for(client: socket.socket) -> None:
    """Runs the client's command in another process, and tells the client its process id and its exit code."""
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    with client.makefile("rw", encoding="utf-8") as lines:
        request = json.loads(lines.readline())
        process = multiprocessing.get_context("fork").Process(target=_run, args=(request, streams))
        process.start()
        for stream in streams:
            os.close(stream)
        print(process.pid, file=lines, flush=True)
        if process.sentinel not in wait([process.sentinel, client]):  # the client was killed
            process.kill()
        process.join()
        print(process.exitcode, file=lines, flush=True)


def _run(request: dict[str, Any], streams: list[int]) -> None:
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    # The server's own were made for other files.
    sys.stdin, sys.stdout, sys.stderr = (
        open(descriptor, mode, buffering=1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        for descriptor, (mode, errors) in enumerate(_STREAMS)
    )
    first, *rest = request["arguments"]
    with become_command(request["environment"], request["folder"]):
        if first == "-m":
            sys.argv = rest
            sys.path.insert(0, request["folder"])
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
