"""Runs a test function in this process as the only rank of a gloo group, and restores the process's state afterwards.

Most tests need a process group but no second rank, and starting a process costs more than such a test computes. Tests
that need several ranks, or that end their process, call `run_distributed`.
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
    """Calls `function(*args)` like `run_distributed(function, 1, *args)[0]`, but in this process.

    RANK, WORLD_SIZE and LOCAL_RANK are set, and a gloo process group is initialized; the function may destroy it.
    """
    with clean_process():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return function(*args)


@contextlib.contextmanager
def clean_process() -> Iterator[None]:
    """Restores the state of this process when the block ends, so that a test may train inside the block.

    It restores the global state of torch, mcore and this package (process groups, parallel state, random streams,
    attached losses, gradient mode, default dtype, threads), the environment, the command line and the warning filters.
    """
    shutdown = process_groups.shutdown  # a test may replace it, to train several times in one group
    environment, arguments, threads = dict(os.environ), sys.argv, torch.get_num_threads()
    random_states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype, has_gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # mcore causes deprecation warnings, which Python does not show outside of tests either.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        process_groups.shutdown = shutdown
        shutdown()
        get_cuda_rng_tracker().reset()
        LayerLosses.scale, LayerLosses.loss_scale, LayerLosses.evaluating = 1.0, 1.0, False
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
