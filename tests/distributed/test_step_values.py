"""The values of layers reach every rank under names that only one stage knows; only new names are exchanged."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS
from megatron_ext.training.engine.step_values import LayerNames, StepValues


def _steps(layout: str) -> tuple[list[dict[str, float]], list[int]]:
    """What each of five steps reads, and after which of them the ranks have exchanged names."""
    initialize(LAYOUTS[layout], seed=1)
    rank = dist.get_rank()
    exchanged: list[int] = []

    class Counted(LayerNames):
        def exchange(self, own: Any) -> None:
            exchanged.append(len(found) + 1)
            super().exchange(own)

    names, found = Counted(), list[dict[str, float]]()
    of_stage = "z" if layout == "PP2" and rank == 0 else "a"
    for step in range(1, 6):
        if step > 1:  # in the first step no layer records
            LayerLosses.record(
                f"{of_stage}/layer_{rank if layout == 'PP2' else 0}", torch.tensor(step + 10.0 * rank)
            )
        if step == 4 and (rank == 1 or layout == "DP2"):
            LayerLosses.record("new/layer_1", torch.tensor(7.0))
        found.append(StepValues([], (), names, of_nothing=0.0).read()[1])
    return found, exchanged


def test_stages_exchange_names_only_when_one_of_them_has_a_new_one() -> None:
    for found, exchanged in run_distributed(_steps, 2, "PP2"):
        assert found[0] == {}
        assert found[1] == {"z/layer_0": 2.0, "a/layer_1": 12.0}
        assert found[3] == {"z/layer_0": 4.0, "a/layer_1": 14.0, "new/layer_1": 7.0}
        assert found[4] == {"z/layer_0": 5.0, "a/layer_1": 15.0}
        assert exchanged == [2, 4]


def test_a_value_is_its_mean_over_data_parallel_ranks() -> None:
    for found, exchanged in run_distributed(_steps, 2, "DP2"):
        assert found[1:] == [
            {"a/layer_0": 7.0},
            {"a/layer_0": 8.0},
            {"a/layer_0": 9.0, "new/layer_1": 7.0},
            {"a/layer_0": 10.0},
        ]
        assert exchanged == [2, 4]
