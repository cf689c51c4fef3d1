"""Runs a test function in processes in which Transformer Engine can be imported; see `install`.

These processes are forks of one process that has imported Transformer Engine and megatron-core.
"""

import atexit
import functools
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.transformer_engine.install import FOLDER, install

needs_te = pytest.mark.skipif(
    not FOLDER.exists(),
    reason="Transformer Engine's Python code is missing; `make install` installs it (1 MB)",
)
"""Mark for tests that call `run_with_te`: skips them if Transformer Engine's Python code is missing."""


def run_with_te(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Does the same as `run_distributed`, but in processes that can import Transformer Engine."""
    server = _server()
    # Pickled here, so that the function's module, and with it megatron-core, is not imported before `install`.
    server.send((pickle.dumps((function, args)), world_size))
    error, results = pickle.loads(server.recv_bytes())
    if error is not None:
        raise RuntimeError(error)
    return list(results)


@functools.cache
def _server() -> Connection:
    """Starts the process from which all others are forked; that process ends when this one closes the connection."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,)).start()
    theirs.close()
    atexit.register(ours.close)
    return ours


def _serve(connection: Connection) -> None:
    install()
    import megatron_ext.testing.preload  # noqa: F401

    while True:
        try:
            pickled, world_size = connection.recv()
        except EOFError:
            return
        error, results = None, []
        try:
            fork = multiprocessing.get_context("fork")
            results = run_distributed(_call, world_size, pickled, start=fork)
        except RuntimeError as failed:
            error = str(failed)
        connection.send_bytes(pickle.dumps((error, results)))


def _call(pickled: bytes) -> Any:
    function, args = pickle.loads(pickled)
    return function(*args)
