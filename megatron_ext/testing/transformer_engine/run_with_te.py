"""Runs a test function in processes in which Transformer Engine can be imported; see `install`."""

import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.transformer_engine.install import FOLDER, install

needs_te = pytest.mark.skipif(
    not FOLDER.exists(), reason="Transformer Engine's Python is not there; `make install` brings it (1 MB)"
)
"""Mark of tests that call `run_with_te`."""


def run_with_te(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Like `run_distributed`, but in new processes that can import Transformer Engine."""
    # Pickled here, so that the function's module, and with it megatron-core, is not imported before `install`.
    pickled = pickle.dumps((function, args))
    return run_distributed(_call, world_size, pickled, start=multiprocessing.get_context("spawn"))


def _call(pickled: bytes) -> Any:
    install()
    function, args = pickle.loads(pickled)
    return function(*args)
