"""`--cross-entropy-loss-fusion` changes the number of collectives, and not the training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import GLOBAL_BATCH_SIZE, LAYOUTS, TINY, train_tiny

STEPS = 2


def _train() -> dict[bool, tuple[list[float], list[float], int]]:
    """Losses, gradient norms and the number of all-reduces, with and without the flag."""
    torch.compiler.set_stance("force_eager")  # compiling the engine's functions takes half a minute on a CPU
    module: Any = dist
    counted, original = 0, dist.all_reduce

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += 1
        return original(*args, **kwargs)

    module.all_reduce = all_reduce
    found = {}
    for fuses in (False, True):
        counted = 0
        parallel = replace(LAYOUTS["TP2"], cross_entropy_loss_fusion=fuses)
        trace = train_tiny(parallel, STEPS, list, TINY, precision="bf16")
        found[fuses] = trace.losses, trace.grad_norms, counted
    return found


def test_the_fused_loss_saves_a_collective_per_micro_batch_and_trains_alike() -> None:
    for found in run_distributed(_train, 2):
        losses, norms, calls = found[True]
        expected_losses, expected_norms, more_calls = found[False]
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        assert more_calls - calls == STEPS * GLOBAL_BATCH_SIZE
