"""Defines and starts the server process from which the commands of `warm_client` are forked.

The server is for tests of shell scripts that start Python a dozen times, on this host or in network namespaces that
represent other hosts. Tests of signals use `run_until`; tests of imports must use the real interpreter.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_ext.testing.run_distributed import context
from megatron_ext.testing.warm_python.forked_launcher import run_python


@functools.cache
def warm_python() -> str:
    """Returns the path of an executable that runs Python commands like `sys.executable`, but starts in milliseconds."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    lifeline, held = multiprocessing.Pipe(duplex=False)
    executable = folder / "python"
    context.Process(target=_serve, args=(listener, lifeline, str(executable))).start()
    listener.close()
    atexit.register(held.close)  # the server then ends
    client = [sys.executable, "-I", "-S", str(Path(__file__).with_name("warm_client.py"))]
    executable.write_text(
        f'#!/bin/sh\nexec {shlex.join(client)} {folder / "socket"} "$@"\n', encoding="utf-8"
    )
    executable.chmod(0o755)
    return str(executable)


def warm_variables() -> dict[str, str]:
    """Returns the environment variable that makes the example scripts use `warm_python`."""
    return {"PYTHON": warm_python()}


def _serve(listener: socket.socket, lifeline: Connection, executable: str) -> None:
    """Forks a process for each command, until the process that started this server ends."""
    sys.executable = executable  # processes that a command starts by this name are forked too
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
    _enter_host(request["process"])
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    run_python(request["arguments"], request["environment"], request["folder"])


def _enter_host(process: int) -> None:
    """Moves this process into the network and host-name namespaces of another process, unless it is already in
    them.
    """
    for kind in ("net", "uts"):
        theirs = Path(f"/proc/{process}/ns/{kind}")
        if not os.path.samefile(theirs, f"/proc/self/ns/{kind}"):
            with open(theirs, "rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(theirs))
