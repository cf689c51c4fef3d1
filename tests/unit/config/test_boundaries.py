"""Every number that a user can give, at its extremes: taken with sound derived values, or refused by name."""

import dataclasses
import math
import typing
from typing import Any

import pytest

from megatron_ext.config.command_line.field_checks import check_numbers, flag_name
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.npt_training_config import NPTTrainingConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.progressive.settings.progressive_config import ProgressiveConfig
from tests.unit.config.test_config_groups import MINIMAL

CONFIGS: dict[type[Any], dict[str, Any]] = {
    **MINIMAL,
    PerLayerConfig: {"use_per_layer_embedding": True},
    NPTModuleConfig: {},
    NPTTrainingConfig: {},
    ProgressiveConfig: {},
}
INTEGERS = (0, 1, -1, 2**31, 2**63, 10**30)
FLOATS = (0.0, 1.0, -1.0, 1e-40, 1e300, float("inf"), float("nan"))


def numbers(config_type: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Field of one number -> the values to try."""
    found = {}
    for name, hint in typing.get_type_hints(config_type).items():
        kinds = {hint, *typing.get_args(hint)}
        if typing.get_origin(hint) is tuple or any(typing.get_origin(kind) is tuple for kind in kinds):
            continue
        if float in kinds or int in kinds:
            found[name] = FLOATS if float in kinds else INTEGERS
    return found


def checked(config_type: type[Any], **values: Any) -> Any:
    """As `parse` makes a configuration."""
    config = config_type(**{**CONFIGS[config_type], **values})
    check_numbers(config)
    return config


def check_derived(config: Any) -> None:
    for name in dir(type(config)):
        if name.startswith("resolved_") and isinstance(getattr(type(config), name), property):
            assert getattr(config, name) >= 1, name


@pytest.mark.parametrize("config_type", CONFIGS)
def test_an_extreme_number_has_sound_derived_values_or_is_refused_by_its_flags_name(
    config_type: type[Any],
) -> None:
    for name, values in numbers(config_type).items():
        for value in values:
            try:
                config = checked(config_type, **{name: value})
            except ValueError as error:
                message = str(error)
                assert "\n" not in message
                # A length beside another one, or a size that does not divide, is told by the flag it clashes with too.
                assert flag_name(name) in message, (name, value, message)
                continue
            assert math.isfinite(value), (name, value)
            check_derived(config)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_derived_sizes_of_small_models_are_at_least_one_or_refused(swiglu: bool, heads: int) -> None:
    for hidden_size in range(1, 130):
        values = {"hidden_size": hidden_size, "num_attention_heads": heads, "swiglu": swiglu}
        try:
            config = checked(ModelConfig, **values)
        except ValueError as error:
            assert str(hidden_size) in str(error)  # noqa: PT017  either outcome is right
            continue
        check_derived(config)
        assert config.resolved_kv_channels * heads == hidden_size
        assert dataclasses.replace(config, ffn_hidden_size=1).resolved_ffn_hidden_size == 1
