"""A step that is not finite, in bf16 with fp32 main weights: skipped whole on every rank, at every layout.

The NaN or the infinity is on the last rank alone, in a weight, in the loss, or in a gradient while the loss is finite.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES, synthetic_batches
from megatron_ext.training.engine.data_parallel import gather_parameters, wrap_model
from megatron_ext.training.engine.lr_schedule import build_scheduler
from megatron_ext.training.engine.optimizer import build_optimizer
from megatron_ext.training.engine.training_step import Stepper
from megatron_ext.training.interface.family_interface import Batch

_OVERLAPPED = replace(
    LAYOUTS["DP2 distributed optimizer"], overlap_grad_reduce=True, overlap_param_gather=True
)
_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("TP1", "DP2", "DP2 distributed optimizer", "TP2", "PP2")},
    "DP2 distributed optimizer, overlapped": _OVERLAPPED,
}
_POISONS = ("weight", "loss", "gradient")


def _stepper(parallel: ParallelConfig) -> Stepper:
    initialize(parallel, seed=1)
    settings = OptimizerSettings(lr=1e-2, lr_decay_style="cosine", min_lr=1e-4)
    chunks = wrap_model(
        build_model(TINY, parallel, vocab_size=VOCAB_SIZE, seed=1, precision="bf16"),
        parallel,
        precision="bf16",
    )
    optimizer = build_optimizer(settings, parallel, chunks, [], precision="bf16")
    return Stepper(
        chunks,
        [],
        optimizer,
        build_scheduler(settings, TrainingConfig(train_iters=10), optimizer, 4),
        global_batch_size=4,
        micro_batch_size=1,
        clip_grad=1.0,
    )


def _snapshot(stepper: Stepper) -> dict[str, torch.Tensor]:
    """This rank's bf16 weights, fp32 main weights, moments and counts of updates, and the schedule."""
    gather_parameters(stepper.chunks)
    state: dict[str, torch.Tensor] = {}
    for number, model in enumerate(stepper.models):
        state |= {f"model {number} {name}": p for name, p in model.named_parameters()}
    parts = getattr(stepper.optimizer, "chained_optimizers", [stepper.optimizer])
    mains = [(part.optimizer, p) for part in parts for g in part.optimizer.param_groups for p in g["params"]]
    for number, (inner, main) in enumerate(mains):
        assert main.dtype == torch.float32
        state[f"{number} main"] = main
        state |= {f"{number} {name}": torch.as_tensor(value) for name, value in inner.state[main].items()}
    for number, group in enumerate(stepper.optimizer.param_groups):
        state[f"{number} rate"] = torch.tensor([group["lr"], group["weight_decay"]])
    state["schedule"] = torch.tensor(stepper.scheduler.num_steps)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _with_nan(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        batch["loss_mask"][0, 3] = float("nan")
        yield batch


def _poisoned_step(stepper: Stepper, batches: Iterator[Batch], poison: str) -> tuple[bool, bool]:
    """A step that is not finite on the last rank: whether it was skipped, and whether its loss was finite."""
    weight = next(
        p for name, p in stepper.models[-1].named_parameters() if name.endswith("linear_fc2.weight")
    )
    kept, hook = weight.detach().clone(), None
    if dist.get_rank() == dist.get_world_size() - 1:
        if poison == "weight":
            weight.data[0, 0] = float("nan")
        elif poison == "loss":
            batches = _with_nan(batches)
        else:
            hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    result = stepper.train(batches, 2)
    weight.data.copy_(kept)
    if hook is not None:
        hook.remove()
    return result.skipped, bool(torch.tensor(result.loss).isfinite())


def _poisoned(parallel: ParallelConfig) -> list[tuple[Any, ...]]:
    """For every poison: a good step, a poisoned one, and the states around it; then a good one again."""
    found = []
    for poison in _POISONS:
        stepper, batches = _stepper(parallel), synthetic_batches(TINY.seq_length)
        assert not stepper.train(batches, 1).skipped
        before = _snapshot(stepper)
        told = _poisoned_step(stepper, batches, poison)
        after = _snapshot(stepper)
        healed = stepper.train(batches, 3)
        found.append((told, before, after, healed.skipped, _snapshot(stepper)))
    return found


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_a_bf16_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(layout: str) -> None:
    for of_rank in run_distributed(_poisoned, WORLD_SIZES.get(layout, 2), _LAYOUTS[layout]):
        for poison, (told, before, after, skipped_again, healed) in zip(_POISONS, of_rank, strict=True):
            skipped, loss_is_finite = told
            assert skipped and (loss_is_finite or poison != "gradient")
            assert {name.split()[-1] for name in before} >= {"main", "exp_avg", "exp_avg_sq", "step", "rate"}
            assert before.keys() == after.keys()
            for name, value in before.items():
                assert torch.equal(value, after[name]), (poison, name)
            assert not skipped_again
            assert int(healed["0 step"]) == int(before["0 step"]) + 1 == 2
            assert int(healed["schedule"]) == int(before["schedule"]) + 4
            assert all(bool(value.isfinite().all()) for value in healed.values())
