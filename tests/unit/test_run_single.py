"""A run in the test's own process has a group of one rank and leaves nothing behind; no unit test starts a process."""

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, train_tiny


def _run_that_fails() -> None:
    assert (dist.get_rank(), dist.get_world_size(), os.environ["WORLD_SIZE"]) == (0, 1, "1")
    train_tiny(LAYOUTS["TP1"], 1)
    LayerLosses.scale, LayerLosses.evaluating = 0.25, True
    LayerLosses.record("left", torch.ones(()))
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    raise ArithmeticError("seven is not eight")


def test_a_run_that_fails_leaves_the_process_as_it_was() -> None:
    environment, drawn, threads = dict(os.environ), torch.get_rng_state(), torch.get_num_threads()
    with pytest.raises(ArithmeticError, match="seven is not eight"):
        run_single(_run_that_fails)
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    assert not get_cuda_rng_tracker().is_initialized()
    assert (LayerLosses.scale, LayerLosses.evaluating, LayerLosses._sums) == (1.0, False, {})
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert dict(os.environ) == environment and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn)


def test_runs_after_one_another_do_not_depend_on_what_ran_before() -> None:
    first, second = (run_single(train_tiny, LAYOUTS["TP1"], 2) for _ in range(2))
    assert first.losses == second.losses and first.grad_norms == second.grad_norms


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", ""], check=False),
        lambda: multiprocessing.get_context("forkserver").Process(target=print).start(),
        lambda: multiprocessing.get_context("fork").Pool(1),
        lambda: os.fork() or os._exit(0),
    ],
    ids=["subprocess", "forkserver", "pool", "fork"],
)
def test_a_unit_test_that_starts_a_process_fails(start: object) -> None:
    with pytest.raises(AssertionError, match="move it out of tests/unit"):
        start()  # type: ignore[operator]
