"""Converts configurations to dictionaries that JSON can store (for checkpoints and manifests) and to YAML text.

The YAML text is a valid `--config` file: a run's printed configuration can start the same run again.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_ext.config.command_line.flag_table import did_you_mean, groups_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

G = TypeVar("G", bound="DataclassInstance")


def group_to_dict(group: "DataclassInstance") -> dict[str, Any]:
    """Returns a config group as `{field: value}` with plain JSON types; tuples become lists."""
    return {name: _plain(value) for name, value in dataclasses.asdict(group).items()}


def config_to_dict(config: object) -> dict[str, dict[str, Any]]:
    """Returns a configuration as `{group: {field: value}}` with plain JSON types."""
    return {name: group_to_dict(getattr(config, name)) for name in groups_of(type(config))}


def group_from_dict(group_type: type[G], values: Mapping[str, Any], name: str) -> G:
    """Builds a config group from the result of `group_to_dict`, and checks it.

    Args:
        group_type: dataclass of the group.
        values: result of `group_to_dict`.
        name: name of the group, for error messages.

    Raises:
        ValueError: `values` has an unknown key or an invalid value.
    """
    known = [field.name for field in dataclasses.fields(group_type)]
    for key in values:
        if key not in known:
            raise ValueError(
                f"section {name} of the stored configuration has the unknown key {key}{did_you_mean(key, known)}"
            )
    return group_type(**{key: _frozen(value) for key, value in values.items()})


def group_in(group_type: type[G], stored: Mapping[str, Any], name: str) -> G:
    """Builds the config group `name` from a stored configuration, which contains all groups.

    The values are checked as by `group_from_dict`.

    Raises:
        ValueError: the configuration lacks the group, or the group has an unknown key or an invalid value.
    """
    if name not in stored:
        raise ValueError(
            f"the stored configuration has no section {name}; its sections are {', '.join(stored)}"
        )
    return group_from_dict(group_type, stored[name], name)


def format_groups(groups: Mapping[str, "DataclassInstance | Mapping[str, Any]"]) -> str:
    """Returns config groups as YAML text: one section per group, with every field of the group."""
    # Imported late, because importing YAML takes time and most command lines do not need it.
    import yaml

    return yaml.safe_dump(sections_of(groups), sort_keys=False, default_flow_style=None, width=100)


def sections_of(groups: Mapping[str, "DataclassInstance | Mapping[str, Any]"]) -> dict[str, dict[str, Any]]:
    """Converts config groups to JSON values; groups that are JSON values already are returned unchanged."""
    return {
        name: dict(group) if isinstance(group, Mapping) else group_to_dict(group)
        for name, group in groups.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(inner) for inner in value) if isinstance(value, list) else value
