"""What a step of a phase trains, keeps and computes, against the built model and torch's counter of FLOPs."""

import functools
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.progressive.growth.rack import rack_of
from megatron_ext.progressive.growth.trunk_strategy import Trains
from megatron_ext.progressive.progressive_family import ProgressiveFamily
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from megatron_ext.testing.counted_flops import StepFigures, measured_and_predicted
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE

MODEL = replace(TINY, num_layers=5, attention_backend="local", untie_embeddings_and_output_weights=True)
TIED = replace(MODEL, untie_embeddings_and_output_weights=False)


def case(
    trains: Trains = "newest", model: ModelConfig = MODEL, **config: Any
) -> tuple[ProgressiveConfig, Trains, ModelConfig]:
    """A rack of three layers and a new stack of two."""
    own = {"training_objective": "clm", "n_blocks": (3, 2), "target_stacks": 2, "qlora_rank": 4}
    return ProgressiveConfig(**{**own, **config}), trains, model


MASKED: dict[str, Any] = {
    "training_objective": "mlm",
    "mask_token_id": VOCAB_SIZE - 1,
    "time_interpretation": "input",
}
CASES = {
    "append, frozen": case(cache_activations=False),
    "append, frozen, no adapters": case(cache_activations=False, qlora_enabled=False),
    "append, frozen, first epoch": case(),
    "append, frozen, second epoch": case(),
    "append, qlora": case(trunk_strategy="qlora"),
    "append, embedding trained": case(train_embedding=True),
    "append, tied": case(model=TIED, train_embedding=True),
    "append, half precision": case(cache_activations=False, trunk_precision="half"),
    "prepend, frozen": case(building_mode=("prepend",)),
    "prepend, qlora": case(building_mode=("prepend",), trunk_strategy="qlora"),
    "joint": case(trains="all"),
    "time told": case(**MASKED, train_embedding=True, time_embedding_dim=24),
    "time told, learned, frozen": case(
        **MASKED, building_mode=("prepend",), time_encoding_type="learned", num_time_steps=50
    ),
}


def _figures() -> dict[str, tuple[StepFigures, StepFigures]]:
    found = {}
    for name, (config, trains, model) in CASES.items():
        family = ProgressiveFamily(
            config, rack_of(config, 2), trains, mask_token_id=config.mask_token_id, cache_identity={}
        )
        epochs = 1 + ("second epoch" in name)
        found[name] = measured_and_predicted(family, model, 1, earlier_steps=epochs - 1)
        family.close()
    return found


@functools.cache
def figures() -> dict[str, tuple[StepFigures, StepFigures]]:
    return run_single(_figures)


@pytest.mark.parametrize("name", CASES)
def test_trained_parameters_gradients_and_moments_are_the_phases(name: str) -> None:
    measured, predicted = figures()[name]
    assert replace(measured, flops=0) == replace(predicted, flops=0)


@pytest.mark.parametrize("name", CASES)
def test_flops_of_a_step_equal_torchs_count(name: str) -> None:
    measured, predicted = figures()[name]
    assert predicted.flops == pytest.approx(measured.flops, rel=1e-12)


def test_a_frozen_trunk_costs_less_from_one_way_of_growing_to_the_next() -> None:
    """The same model: a trunk that a gradient passes, one that is only run, one whose output is known."""
    names = ("prepend, frozen", "append, frozen", "append, frozen, second epoch")
    prepended, appended, cached = (figures()[name][1].flops for name in names)
    assert cached < appended < prepended < figures()["joint"][1].flops
