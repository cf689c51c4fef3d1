"""Converts configurations to dictionaries of JSON types (for checkpoints and manifests) and to YAML text.

The YAML text is a valid `--config` file, so what a run prints can start the same run again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_ext.config.command_line.flag_table import ConfigGroups, did_you_mean


def configs_to_dict(configs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns `{name: {field: value}}` of plain JSON types; tuples become lists."""
    return {name: _plain(dataclasses.asdict(config)) for name, config in configs.items()}


def configs_from_dict(groups: ConfigGroups, values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Builds configurations from the result of `configs_to_dict`, and checks them.

    Args:
        groups: name -> dataclass of the groups to build; other names in `values` are ignored.
        values: result of `configs_to_dict`.

    Raises:
        ValueError: a group is missing, or has an unknown key or an invalid value.
    """
    configs = {}
    for name, config_type in groups.items():
        if name not in values:
            raise ValueError(f"the configuration has no section {name}, only {', '.join(values)}")
        known = [field.name for field in dataclasses.fields(config_type)]
        for key in values[name]:
            if key not in known:
                raise ValueError(
                    f"the configuration's section {name}: unknown key {key}{did_you_mean(key, known)}"
                )
        configs[name] = config_type(**{key: _frozen(value) for key, value in values[name].items()})
    return configs


def format_configs(configs: Mapping[str, Any]) -> str:
    """Returns the effective configuration as YAML, one section per config group, every field with its value."""
    return yaml.safe_dump(configs_to_dict(configs), sort_keys=False, default_flow_style=None, width=100)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(inner) for inner in value) if isinstance(value, list) else value
