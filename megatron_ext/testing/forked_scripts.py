"""Runs a script as a shell would, but in processes that have already imported torch and mcore.

The processes are forked from the server that `run_distributed` uses; a new Python process would need five seconds for
these imports. Tests of the launcher or of the imports must start the real command instead.
"""

import atexit
import contextlib
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_ext.testing.run_distributed import context
from megatron_ext.testing.torchrun import ROOT, environment

_SECONDS_FOR_THE_OTHERS = 20.0
"""Seconds that the other ranks get to end after one has failed; `torchrun` waits too."""


def run_script(
    script: str,
    *flags: str,
    processes: int = 1,
    before: Callable[[], None] | None = None,
    timeout: float = 240.0,
    start: Any = context,
) -> "subprocess.CompletedProcess[str]":
    """Runs `python script flags` on one or several ranks, and waits until all have ended.

    Args:
        script: path relative to the root of the repository.
        flags: command line of the script.
        processes: number of ranks; they connect to each other as under `torchrun`.
        before: module-level function that every process calls first.
        timeout: seconds after which all processes are killed.
        start: multiprocessing context that starts the processes.

    Returns:
        Exit code (of the rank that failed first, else 0), standard output and standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = f"{folder}/stdout", f"{folder}/stderr"
        started: list[BaseProcess] = [
            start.Process(
                target=_run, args=(str(ROOT / script), flags, environment() | place, outputs, before)
            )
            for place in _places(processes)
        ]
        for process in started:
            process.start()
        try:
            code = _first_failure(started, timeout)
        finally:
            for process in started:
                process.kill()
                process.join()
        texts = (Path(path).read_text(encoding="utf-8") for path in outputs)
        return subprocess.CompletedProcess([script, *flags], code, *texts)


def _places(processes: int) -> list[dict[str, str]]:
    """Returns the environment variables to set on each rank (none for a single process)."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _first_failure(started: list[BaseProcess], timeout: float) -> int:
    """Waits for all processes (only briefly once one has failed); returns the exit code of the failed one, else 0."""
    first, deadline = 0, time.monotonic() + timeout
    while any(process.is_alive() for process in started):
        failed = [process.exitcode for process in started if process.exitcode]
        if failed and not first:
            first, deadline = failed[0], time.monotonic() + _SECONDS_FOR_THE_OTHERS
        if time.monotonic() > deadline:
            if first:
                return first
            raise subprocess.TimeoutExpired(started[0].name, timeout)
        time.sleep(0.02)
    return first or next((process.exitcode for process in started if process.exitcode), 0)


def _run(
    script: str,
    flags: tuple[str, ...],
    variables: dict[str, str],
    outputs: tuple[str, str],
    before: Callable[[], None] | None,
) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    with become_command(variables, ROOT):
        if before is not None:
            before()
        runpy.run_path(script, run_name="__main__")


@contextlib.contextmanager
def become_command(variables: Mapping[str, str], folder: str | Path) -> Iterator[None]:
    """Sets the environment and directory as for a new command, and runs the command's exit functions at the end."""
    import torch

    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    torch.set_num_threads(1)
    atexit._clear()
    try:
        yield
    finally:
        atexit._run_exitfuncs()
