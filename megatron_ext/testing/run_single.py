"""Runs a test function as the only rank of a gloo group in this process, and leaves the process as it was.

Most of what a test asks needs a group but no second rank. Without a process of its own a test costs what it computes.
Tests that need several ranks, or end their process, call `run_distributed`.
"""

import contextlib
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.platform import process_groups


def run_single(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function(*args)` as `run_distributed(function, 1, *args)[0]` does, but in this process.

    The function finds RANK, WORLD_SIZE, LOCAL_RANK in its environment and an initialised gloo process group, which it
    may end.
    """
    with clean_process():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return function(*args)


@contextlib.contextmanager
def clean_process() -> Iterator[None]:
    """Within it a run may start; afterwards nothing of the run is left in the process.

    Restored are what torch, the engine and this package keep once per process: groups, parallel state, random
    streams, attached losses, gradient mode, default type, threads; and the environment, the command line and the
    filters of warnings.
    """
    shutdown = process_groups.shutdown  # which a test replaces to train several times in one group
    environment, arguments, threads = dict(os.environ), sys.argv, torch.get_num_threads()
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype, has_gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # The engine's about itself, which Python does not show a program's user either.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        process_groups.shutdown = shutdown
        shutdown()
        get_cuda_rng_tracker().reset()
        LayerLosses.scale, LayerLosses.evaluating = 1.0, False
        LayerLosses._sums, LayerLosses._counts = {}, {}
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(has_gradients)
        random.setstate(random_states[0])
        np.random.set_state(random_states[1])
        torch.set_rng_state(random_states[2])
