"""Ranks per layer and target: how they are given, stored and counted, and which weights they build."""

import json
from dataclasses import replace

import pytest

from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_from_dict, group_to_dict
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.modules.np_ranks import described, normalised
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.runs.npt_model import NPTConfig
from megatron_ext.npt.weights.np_factors import gather_np_factors
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE

LISTED = NPTModuleConfig(npt_layers="1,2,3", np_target="gate+up+down", np_rank="4,6/2,8")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (16, 16),
        ("16", 16),
        ("16/16", 16),
        ("8,8,8", 8),
        ("8/4,8/4", "8/4"),
        ("8/4", "8/4"),
        ("4, 6/2,8", "4,6/2,8"),
        ("auto:0.15", "auto:0.15"),
        ("auto:kl=0.01", "auto:kl=0.01"),
    ],
)
def test_ranks_are_stored_in_one_form_and_come_back_from_json(given: str | int, stored: str | int) -> None:
    settings = NPTModuleConfig(
        np_rank=given, np_form="key_value", np_target="gate+up", np_init_strategy="calibrated"
    )
    assert settings.np_rank == stored
    values = json.loads(json.dumps(group_to_dict(settings)))
    assert group_from_dict(NPTModuleConfig, values, "np") == settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "must be a whole number, such as 64; two numbers, for fc1 and down"),
        ("4,", "must be a whole number"),
        ("1/2/3", "must be a whole number"),
        ("4,0", "--np-rank 4,0: every rank must be at least 1"),
        ("auto", "must be a whole number"),
        ("auto:", "the limit must be a number above 0"),
        ("auto:-1", "the limit must be a number above 0"),
        ("auto:kl=0", "the limit must be a number above 0"),
        ("auto:8", "--np-rank auto:8: the share must be a fraction of at most 1, such as auto:0.08$"),
        ("auto:800", "the share must be a fraction of at most 1, such as auto:0.15$"),
        ("auto:0.1", "--np-rank auto:0.1: requires --np-init-strategy calibrated \\(got improved\\)"),
    ],
)
def test_other_ranks_are_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPTModuleConfig(np_rank=given)


def test_a_layer_and_target_has_its_own_rank() -> None:
    ranks = {
        layer: [LISTED.rank(layer, target, 4) for target in ("gate", "up", "down")] for layer in (1, 2, 3)
    }
    assert ranks == {1: [4, 4, 4], 2: [6, 6, 2], 3: [8, 8, 8]}
    assert replace(LISTED, np_rank="5/7").rank(2, "down", 4) == 7
    with pytest.raises(
        ValueError,
        match="--np-rank 4,6/2,8: must have one entry or one per NPT layer .got 3 entries for 2 layers",
    ):
        replace(LISTED, npt_layers="1,2").rank(1, "gate", 4)


def test_other_layers_keep_the_ranks_that_they_have() -> None:
    fewer = LISTED.with_layers([3, 2])
    assert (fewer.npt_layers, fewer.np_rank) == ("2,3", "6/2,8")
    assert LISTED.with_layers([3]).np_rank == 8
    with pytest.raises(
        ValueError,
        match=r"--np-rank 4,6/2,8: gives ranks for layers 1,2,3 \(--npt-layers\), but layer 0 needs one too",
    ):
        LISTED.with_layers([0, 1])


def test_a_flag_a_file_and_python_give_the_same_ranks() -> None:
    assert parse(NPTModuleConfig, ["--np-rank", "4,6/2,8"]).np_rank == "4,6/2,8"
    assert parse(NPTModuleConfig, ["--rank", "32"]).np_rank == 32
    assert NPTConfig([1, 2], [4, 6]).module.np_rank == "4,6"


def test_messages_show_the_range_of_a_list() -> None:
    assert described(normalised("64")) == "64"
    assert described("8/4") == "8/4"
    assert described("4,8,6") == "4 to 8"
    assert described("4/2,8/6") == "4 to 8 (down 2 to 6)"


def _shapes(settings: NPTModuleConfig) -> tuple[dict[str, tuple[int, ...]], int, int]:
    """Of the built factors; their number of parameters, and what the cost says."""
    initialize(ParallelConfig(), seed=1)
    family = NPTFamily(settings)
    chunks = build_model(
        TINY, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1, extensions=[family.extension()]
    )
    factors = gather_np_factors(chunks)
    shapes = {key: tuple(value.shape) for key, value in factors.items()}
    return shapes, sum(value.numel() for value in factors.values()), family.cost(TINY).parameters


@pytest.mark.parametrize("form", ["low_rank", "outer_product", "key_value"])
def test_factors_and_cost_follow_the_ranks(form: str) -> None:
    settings = replace(LISTED, np_form=form)  # type: ignore[arg-type]
    shapes, counted, cost = run_single(_shapes, settings)
    assert counted == cost
    name = "W_b_up" if form == "outer_product" else "B"
    of_b = {key: shape[0] for key, shape in shapes.items() if key.endswith(f".{name}")}
    assert of_b == {
        f"layer_{layer}_np.{target}.{name}": settings.rank(layer, target, TINY.num_layers)
        for layer in (1, 2, 3)
        for target in settings.targets
    }
