"""Every objective trains the same at every parallel layout; what it feeds and asks: tests/unit/progressive."""

from typing import Any

import pytest

from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.testing.layout_runs import LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.tiny_training import assemble
from tests.unit.progressive.objective_helpers import MODEL, ObjectiveFamily
from tests.unit.progressive.test_stack_objective import CONFIGS


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, config: ProgressiveConfig) -> None:
        self.config = config

    def __call__(self) -> list[Any]:
        return [ObjectiveFamily(self.config)]


RUNS = LayoutRuns(
    {name: Variant(make_families=_Make(config), model=MODEL) for name, config in CONFIGS.items()},
    ["TP2", "PP2", "PP2 interleaved", "TP2+SP", "TP1 recomputed", "CP2", "PP2xCP2", "TP2+SPxCP2 recomputed"],
)


@pytest.mark.parametrize(("layout", "name"), RUNS.cases())
def test_every_layout_trains_as_the_single_process_does(layout: str, name: str) -> None:
    assert_same_run(RUNS.at(layout, name), RUNS.single(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient_and_time_as_input_has_a_projection(name: str) -> None:
    gradients = assemble([RUNS.single(name).trace])
    assert ("objective.projection" in gradients) == ("time" in name)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients.values())
