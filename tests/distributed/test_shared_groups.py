"""One gloo group for every set of ranks: the sets are megatron-core's own, and so is what collectives give."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.platform.process_groups import initialize, set_parallel_state
from megatron_ext.testing.run_distributed import run_distributed

_THREADS_OF_A_GROUP = 3
GETTERS = (
    "get_model_parallel_group",
    "get_tensor_model_parallel_group",
    "get_pipeline_model_parallel_group",
    "get_data_parallel_group",
    "get_context_parallel_group",
    "get_embedding_group",
    "get_position_embedding_group",
    "get_tensor_and_data_parallel_group",
    "get_expert_data_parallel_group",
    "get_intra_distributed_optimizer_instance_group",
)
_LAYOUTS = {
    "one process": (1, ParallelConfig(), 1),
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2), 2),
    "DP2": (2, ParallelConfig(), 2),
    "TP2 x PP2": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 4),
}
"""Processes, layout, and how many sets of ranks a process is in."""


def _groups() -> dict[str, Any]:
    found = {}
    for name in GETTERS:
        try:
            found[name] = getattr(parallel_state, name)()
        except AssertionError:  # not on this stage
            continue
    return found


def _ranks() -> dict[str, list[int]]:
    return {name: dist.get_process_group_ranks(group) for name, group in _groups().items()}


def _count_and_reduce(parallel: ParallelConfig) -> dict[str, Any]:
    """The groups' ranks, shared and as the engine makes them, and what the shared ones reduce; threads they cost."""
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    initialize(parallel, seed=1)
    threads = len(os.listdir("/proc/self/task")) - before
    rank, sums = float(dist.get_rank()), {}
    for name, group in _groups().items():
        value = torch.tensor(rank)
        dist.all_reduce(value, group=group)
        sums[name] = float(value)
    shared = _ranks()
    set_parallel_state(ParallelConfig(), seed=1)  # another layout, and back, as tools do
    set_parallel_state(parallel, seed=1)
    again = _ranks(), len(set(map(id, _groups().values())))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    )
    return {"threads": threads, "shared": shared, "again": again, "own": _ranks(), "sums": sums}


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_shared_groups_hold_the_ranks_of_the_engines_own_and_cost_threads_once_for_a_set(layout: str) -> None:
    processes, parallel, sets = _LAYOUTS[layout]
    for found in run_distributed(_count_and_reduce, processes, parallel):
        assert found["shared"] == found["again"][0] == found["own"]
        assert len(found["own"]) >= len(GETTERS) - 2
        assert found["sums"] == {name: float(sum(ranks)) for name, ranks in found["own"].items()}
        assert found["again"][1] <= sets
        # Of the sets one is all processes, whose group was there before.
        assert found["threads"] <= _THREADS_OF_A_GROUP * (sets - 1)


def _message_beside_a_reduction() -> float:
    """What rank 1 gets while both ranks also reduce on the same two ranks; the pipeline's group is the model's too."""
    initialize(ParallelConfig(pipeline_model_parallel_size=2), seed=1)
    pipeline, model = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_model_parallel_group(),
    )
    assert pipeline is model
    message, value = torch.full((4,), 7.0), torch.ones(4)
    received = torch.zeros(4)
    first = dist.get_rank() == 0
    work = dist.isend(message, 1, group=pipeline) if first else dist.irecv(received, 0, group=pipeline)
    assert work is not None
    reduction = dist.all_reduce(value, group=model, async_op=True)
    work.wait()
    reduction.wait()
    assert float(value.sum()) == 8.0
    return float((message if first else received).sum())


def test_messages_between_stages_and_reductions_on_the_same_ranks_do_not_mix() -> None:
    assert run_distributed(_message_beside_a_reduction, 2) == [28.0, 28.0]
