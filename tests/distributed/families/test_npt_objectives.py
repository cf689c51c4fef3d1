"""What NPT trains for: each loss against a plain float64 computation, and the same training at every parallel
layout.
"""

import functools
from dataclasses import replace

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import (
    LAYOUTS,
    TINY,
    WORLD_SIZES,
    TrainingTrace,
    assemble,
    train_tiny,
    with_full_recompute,
)
from megatron_ext.training.interface.family_interface import Family

MODEL = replace(TINY, init_method_std=0.1)
STEPS = 3
FULL = " recomputed"
CASES = [*LAYOUTS, *(f"{cut}{FULL}" for cut in ("TP1", "TP2+SP", "PP2 interleaved"))]

OUTER = NPTModuleConfig(npt_layers="1,2,3", np_form="outer_product", np_rank=8, np_init_scale=0.1)
LOW_RANK = NPTModuleConfig(npt_layers="upper_half", np_target="gate+up+down", np_rank=8, np_residual="keep")
MULTI_LAYER = NPTTrainingConfig(
    mode="multi_layer",
    curriculum_stages="teacher:1,mixed:1:0.3:0.6,student:1",
    layer_weights="linear",
    npt_log_interval=1,
    lm_weight=0.5,
)
VARIANTS = {
    "equivalence": (LOW_RANK, NPTTrainingConfig(mode="equivalence", npt_log_interval=1)),
    "cosine, logits' MSE": (
        LOW_RANK,
        NPTTrainingConfig(
            mode="equivalence", equivalence_loss="cosine", fidelity_weight=1.0, fidelity_loss="mse"
        ),
    ),
    "multi_layer": (OUTER, MULTI_LAYER),
    "single_layer": (replace(OUTER, npt_layers="2"), NPTTrainingConfig(mode="single_layer", stage1_steps=2)),
    "lm": (OUTER, NPTTrainingConfig(mode="lm")),
}


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        return [NPTFamily(*VARIANTS[self.variant], total_steps=STEPS)]


def _train(cuts: dict[str, ParallelConfig]) -> dict[str, dict[str, TrainingTrace]]:
    return {
        cut: {name: train_tiny(parallel, STEPS, _Make(name), model=MODEL) for name in VARIANTS}
        for cut, parallel in cuts.items()
    }


def _world_size(case: str) -> int:
    return WORLD_SIZES[case.removesuffix(FULL)]


@functools.cache
def runs(world_size: int) -> list[dict[str, dict[str, TrainingTrace]]]:
    """All runs with this number of processes, by rank, cut and variant."""
    cuts = {}
    for case in CASES:
        if _world_size(case) == world_size:
            parallel = LAYOUTS[case.removesuffix(FULL)]
            cuts[case] = with_full_recompute(parallel) if case.endswith(FULL) else parallel
    return run_distributed(_train, world_size, cuts)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES[1:])
def test_every_cut_trains_for_the_same_losses_with_the_same_gradients(case: str, variant: str) -> None:
    expected = runs(1)[0]["TP1"][variant]
    of_ranks = [of_rank[case][variant] for of_rank in runs(_world_size(case))]
    found = of_ranks[0]
    for step in range(STEPS):
        assert found.layer_losses[step] == pytest.approx(expected.layer_losses[step], rel=2e-5, abs=1e-9)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5, nan_ok=True)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    if not case.endswith("optimizer"):  # which keeps only parts of the gradients
        gradients, wanted = assemble(of_ranks), assemble([expected])
        assert gradients.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert (
                torch.linalg.norm(gradients[key] - gradient) <= 1e-5 * torch.linalg.norm(gradient) + 1e-12
            ), key
