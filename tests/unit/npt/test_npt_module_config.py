"""NPT's configuration: layer choices, targets in the documents' words, and what is refused."""

from typing import Any

import pytest

from megatron_ext.config.command_line.parse import parse
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig, choose_layers


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6)),
        ("upper_half", (3, 4, 5, 6)),
        ("lower_half", (0, 1, 2)),
        ("0,3,5", (0, 3, 5)),
        ("5,0,5", (0, 5)),
        ("-1", (6,)),
        ("-2,0", (0, 5)),
        ("4:6", (4, 5)),
        ("5:", (5, 6)),
        (":2", (0, 1)),
        ("-2:", (5, 6)),
        ("0, 2:4", (0, 2, 3)),
    ],
)
def test_a_layer_choice_names_layers(text: str, chosen: tuple[int, ...]) -> None:
    assert choose_layers(text, 7) == chosen


def test_the_halves_of_every_model_share_its_layers() -> None:
    for num_layers in range(2, 9):
        halves = choose_layers("lower_half", num_layers) + choose_layers("upper_half", num_layers)
        assert halves == tuple(range(num_layers))


@pytest.mark.parametrize("text", ["", "upper", "1,,2", "1:2:3", "1.5", "a:b"])
def test_what_is_no_layer_choice_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match=f"--npt-layers {text}: must be all, upper_half"):
        NPTModuleConfig(npt_layers=text)


@pytest.mark.parametrize("text", ["7", "-8", "3:3", "4:2", "0:9", "0,7"])
def test_layers_that_the_model_has_not_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=f"--npt-layers {text}: out of range or empty; the model has layers 0 to 6"
    ):
        NPTModuleConfig(npt_layers=text).layers(7)


def test_the_documents_words_name_the_same_targets() -> None:
    pairs: list[tuple[Any, Any]] = [("single", "gate"), ("dual", "gate+up"), ("triple", "gate+up+down")]
    for word, target in pairs:
        assert NPTModuleConfig(np_target=word).targets == NPTModuleConfig(np_target=target).targets
        assert NPTModuleConfig(np_target=target).targets == tuple(target.split("+"))


def test_the_defaults_are_those_of_document_002() -> None:
    settings = NPTModuleConfig()
    found = (settings.npt_layers, settings.np_form, settings.targets, settings.np_rank, settings.np_residual)
    assert found == ("upper_half", "low_rank", ("gate",), 16, "drop")
    assert settings.freeze_base


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"np_rank": 0}, "--np-rank 0: every rank must be at least 1"),
        ({"num_np_components": 0}, "--num-np-components 0: must be at least 1"),
        ({"np_scale": 0.0}, "--np-scale 0.0: must be above 0"),
        ({"np_init_scale": -1.0}, "--np-init-scale -1.0: must be above 0"),
        ({"np_form": "dense"}, "--np-form dense: must be one of low_rank, outer_product, key_value"),
        ({"np_affine": False}, r"--no-np-affine: requires --np-form outer_product \(got low_rank\)"),
        (
            {"np_form": "key_value", "np_target": "gate+up", "num_np_components": 2},
            "--num-np-components 2: --np-form key_value requires 1, .* raise --np-rank instead",
        ),
        (
            {
                "np_init_strategy": "calibrated",
                "np_form": "key_value",
                "np_target": "gate+up",
                "np_scale": 2.0,
            },
            r"--np-init-strategy calibrated: with --np-form key_value, requires --np-scale 1 \(got 2\)",
        ),
        (
            {"np_init_strategy": "calibrated", "np_rank": "auto:0.1"},
            r"--np-rank auto:0.1: requires --np-form key_value \(got low_rank\); pass a number",
        ),
        (
            {"np_init_strategy": "calibrated", "np_form": "outer_product", "np_affine": False},
            "--no-np-affine: not supported with --np-init-strategy calibrated, because",
        ),
        (
            {"np_form": "key_value", "np_target": "gate"},
            "--np-target gate: not supported with --np-form key_value, which changes .*; choose gate.up for",
        ),
        (
            {"np_form": "key_value", "np_target": "gate+up", "np_affine": False},
            r"--no-np-affine: requires --np-form outer_product \(got key_value\)",
        ),
        ({"np_normalize": False}, r"--no-np-normalize: requires --np-form outer_product \(got low_rank\)"),
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPTModuleConfig(**values)


def test_a_target_must_fit_the_mlp() -> None:
    with pytest.raises(
        ValueError, match="--np-target fc1: the model's MLP is gated; choose gate, gate\\+up or"
    ):
        NPTModuleConfig(np_target="fc1").check_model(gated=True)
    with pytest.raises(ValueError, match="--np-target dual: the model's MLP is not gated; choose fc1"):
        NPTModuleConfig(np_target="dual").check_model(gated=False)


def test_the_fields_are_flags() -> None:
    text = (
        "--npt-layers -1,0 --np-form outer_product --np-target gate+up --np_rank 64 --num-np-components 2 "
        "--no-np-affine --np-residual keep --np-init-strategy conservative --no-freeze-base"
    )
    assert parse(NPTModuleConfig, text.split()) == NPTModuleConfig(
        npt_layers="-1,0",
        np_form="outer_product",
        np_target="gate+up",
        np_rank=64,
        num_np_components=2,
        np_affine=False,
        np_residual="keep",
        np_init_strategy="conservative",
        freeze_base=False,
    )
