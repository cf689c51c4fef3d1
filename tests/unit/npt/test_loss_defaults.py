"""The default weights of the losses: they belong to the form of the losses (--layer-losses) and to the mode."""

from dataclasses import replace
from typing import Any, Literal

import pytest

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.objective.npt_training_config import Mode, NPTTrainingConfig
from megatron_ext.npt.weights.npt_resume import earlier_losses
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, train_tiny
from megatron_ext.training.interface.family_interface import Family

NAMES = ("equivalence", "direct_mlp", "fidelity", "regularization", "lm")
DIRECT: tuple[Mode, ...] = ("single_layer", "sequential", "multi_layer")
STEPS = 40


def _weights(mode: Mode, losses: Literal["local", "document"]) -> tuple[float, ...]:
    training = NPTTrainingConfig(mode=mode, layer_losses=losses)
    return tuple(training.weight(f"{name}_weight") for name in NAMES)


def test_local_losses_are_the_default_of_every_mode_and_have_no_regularization() -> None:
    assert all(NPTTrainingConfig(mode=mode).is_local for mode in ("equivalence", *DIRECT, "lm"))
    assert _weights("equivalence", "local") == (1, 0, 0, 0, 0)
    assert {_weights(mode, "local") for mode in DIRECT} == {(0, 1, 1, 0, 0)}


def test_the_documents_losses_come_with_the_documents_weights() -> None:
    assert _weights("equivalence", "document") == (1, 0, 0, 0.01, 0)
    assert {_weights(mode, "document") for mode in DIRECT} == {(0, 10, 1, 0.01, 0)}


def test_cross_entropy_has_the_same_weight_in_both_forms() -> None:
    assert _weights("lm", "local") == _weights("lm", "document") == (0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("stored", "earlier"),
    [
        ({"mode": "multi_layer", "layer_losses": "local", "direct_mlp_weight": None}, {}),
        (
            {"mode": "multi_layer", "layer_losses": None, "direct_mlp_weight": 2.0},
            {"layer_losses": "local", "fidelity_weight": 1.0, "regularization_weight": 0.01},
        ),
        (
            {"mode": "equivalence", "layer_losses": None},
            {"layer_losses": "document", "equivalence_weight": 1.0, "regularization_weight": 0.01},
        ),
        (
            {"mode": "multi_layer"},
            {
                "layer_losses": "document",
                "direct_mlp_weight": 10.0,
                "fidelity_weight": 1.0,
                "regularization_weight": 0.01,
            },
        ),
    ],
)
def test_a_stored_run_without_a_form_of_the_losses_keeps_the_losses_it_had(
    stored: dict[str, Any], earlier: dict[str, Any]
) -> None:
    assert earlier_losses(stored) == earlier


class _Make:
    """Makes the families of a run; travels to the process by pickle."""

    def __init__(self, weight: float | None) -> None:
        self.weight = weight

    def __call__(self) -> list[Family]:
        module = NPTModuleConfig(np_residual="keep", np_target="gate+up", np_rank=8)
        return [NPTFamily(module, NPTTrainingConfig(regularization_weight=self.weight), total_steps=STEPS)]


def _equivalence_losses(weight: float | None) -> list[float]:
    """Mean equivalence loss of the first and the last five steps, relative to the first."""
    model = replace(TINY, init_method_std=0.2)
    trace = train_tiny(ParallelConfig(), STEPS, _Make(weight), model)
    means = [
        sum(v for n, v in step.items() if n.startswith("equivalence_loss/")) for step in trace.layer_losses
    ]
    return [sum(part) / 5 / means[0] for part in (means[:5], means[-5:])]


def test_equivalence_learns_with_its_defaults_and_not_with_a_regularization_of_one_hundredth() -> None:
    first, last = run_single(_equivalence_losses, None)
    assert last < 0.8 * first
    assert run_single(_equivalence_losses, 0.01)[1] > last + 0.1
