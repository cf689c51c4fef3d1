"""NPT's losses train the same at every parallel layout; each against a plain computation: tests/unit/npt."""

from dataclasses import replace

import pytest

from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.testing.layout_runs import (
    OVERLAPPED,
    OVERLAPPED_PIPELINE,
    LayoutRuns,
    Variant,
    assert_same_run,
)
from megatron_ext.testing.tiny_training import LAYOUTS, TINY
from megatron_ext.training.interface.family_interface import Family

MODEL = replace(TINY, init_method_std=0.1)
OUTER = NPTModuleConfig(npt_layers="1,2,3", np_form="outer_product", np_rank=8, np_init_scale=0.1)
LOW_RANK = NPTModuleConfig(npt_layers="upper_half", np_target="gate+up+down", np_rank=8, np_residual="keep")
KEY_VALUE = replace(LOW_RANK, np_form="key_value", np_init_scale=0.1)
MULTI_LAYER = NPTTrainingConfig(
    mode="multi_layer",
    curriculum_stages="teacher:1,mixed:1:0.3:0.6,student:1",
    layer_weights="linear",
    regularization_weight=0.01,
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
    "key_value, curriculum": (KEY_VALUE, MULTI_LAYER),
    "multi_layer, the documents' losses": (OUTER, replace(MULTI_LAYER, layer_losses="document")),
    "equivalence, the document's losses": (
        LOW_RANK,
        NPTTrainingConfig(mode="equivalence", npt_log_interval=1, layer_losses="document"),
    ),
    "local, base trained": (
        replace(OUTER, np_target="gate+up", np_residual="keep", freeze_base=False),
        NPTTrainingConfig(mode="equivalence", direct_mlp_weight=1.0, fidelity_weight=1.0),
    ),
    "layer_parallel": (LOW_RANK, NPTTrainingConfig(mode="layer_parallel", npt_log_interval=1)),
    "layer_parallel, lower layers, all losses": (
        replace(OUTER, npt_layers="0,1", np_target="gate+up+down"),
        NPTTrainingConfig(
            mode="layer_parallel", equivalence_weight=0.5, regularization_weight=0.1, layer_weights="linear"
        ),
    ),
}


def _steps(variant: str) -> int:
    """The number of steps to train: one in each stage of a curriculum, and two with an objective that stays."""
    return 3 if VARIANTS[variant][1].mode in ("multi_layer", "single_layer") else 2


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        return [NPTFamily(*VARIANTS[self.variant], total_steps=_steps(self.variant))]


DIVIDED = ["multi_layer, the documents' losses", "equivalence, the document's losses", "layer_parallel"]
"""Variants whose losses divide by the size of a whole sequence, or that keep a teacher's states."""

RECOMPUTED = ["TP1 recomputed", "TP2+SP recomputed", "PP2 interleaved recomputed"]
# What an optimizer does with a gradient does not depend on the losses: test_npt_layouts.py has all of NPT's parameters.
LAYOUTS_OF_ALL = [layout for layout in LAYOUTS if layout != "DP2 distributed optimizer"]
RUNS = LayoutRuns(
    {name: Variant(make_families=_Make(name), model=MODEL, steps=_steps(name)) for name in VARIANTS},
    [*LAYOUTS_OF_ALL, *RECOMPUTED, "CP2", "CP2 recomputed"],
    {
        **{layout: ["layer_parallel", "multi_layer"] for layout in (OVERLAPPED, OVERLAPPED_PIPELINE)},
        **dict.fromkeys(("CP4", "TP2+SPxCP2", "PP2xCP2", "PP2xCP2 interleaved"), DIVIDED),
    },
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_trains_for_the_same_losses_with_the_same_gradients(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant))
