"""Converts a YAML configuration file to command-line arguments, so that both go through the same checks.

The file holds flags (`num_layers: 12`, with `-` or `_`), sections of flags by group name, or both. Sections may be
nested, as in `training: {progressive: ...}` (docs/design/progressive_growth.md).
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from megatron_ext.config.command_line.flag_table import ConfigGroups, Flag, did_you_mean, with_dashes
from megatron_ext.config.command_line.megatron_flags import instead_of


def yaml_arguments(
    path: str,
    groups: ConfigGroups,
    flags: Sequence[Flag],
    given: Container[str],
    sections: Mapping[str, Container[str]] = MappingProxyType({}),
) -> list[str]:
    """Returns the file's values as arguments, except for flags that are on the command line.

    Args:
        path: the YAML file.
        groups: section name -> dataclass.
        flags: flags of the groups.
        given: `Flag.name` of the flags on the command line, which override the file.
        sections: section name -> further groups whose flags it may hold.

    Raises:
        ValueError: the file is missing or not a mapping of flags; or it has an unknown key, a repeated key, or a value
            of the wrong type (checked even if the command line overrides it).
    """
    flag_of = {name: flag for flag in flags for name in flag.names}
    arguments: list[str] = []
    unknown: list[str] = []
    seen: set[str] = set()
    for section, key, value in _read(path, groups):
        flag = flag_of.get(with_dashes(key))
        if flag is None or not _belongs(flag, section, sections):
            known = [
                name[2:].replace("-", "_")
                for name, flag in flag_of.items()
                if _belongs(flag, section, sections)
            ]
            where = f" in section {section}" if section is not None else ""
            unknown.append(f"{key}{where}{_instead_of(key, known)}")
            continue
        if flag.name in seen:
            raise ValueError(f"{path}: {key} is given twice")
        seen.add(flag.name)
        if value is not None:
            read = _as_arguments(path, flag, key, value)
            arguments += [] if flag.name in given else read
    if unknown:
        raise ValueError(f"{path}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}")
    return arguments


def _instead_of(key: str, known: list[str]) -> str:
    words = instead_of(with_dashes(key))
    return f" ({words})" if words is not None else did_you_mean(key.replace("-", "_"), known)


def _belongs(flag: Flag, section: str | None, sections: Mapping[str, Container[str]]) -> bool:
    return section in (None, flag.group) or flag.group in sections.get(section or "", ())


def default_arguments(
    sections: Mapping[str, Mapping[str, Any]], flags: Sequence[Flag], given: Container[str]
) -> list[str]:
    """Returns defaults as arguments, except for flags that are given and values that are None.

    Args:
        sections: group name -> field name -> default.
        flags: flags of the groups.
        given: `Flag.name` of the flags that are given.
    """
    flag_of = {(flag.group, flag.name): flag for flag in flags}
    arguments: list[str] = []
    for section, values in sections.items():
        for key, value in values.items():
            flag = flag_of[section, with_dashes(key)]
            if flag.name not in given and value is not None:
                value = list(value) if isinstance(value, tuple) else value
                arguments += _as_arguments("defaults", flag, key, value)
    return arguments


def _as_arguments(path: str, flag: Flag, key: str, value: Any) -> list[str]:
    if flag.is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"{path}: {key} {value}: must be true or false")
        return [flag.name] if value else list(flag.negations[:1])
    if isinstance(value, list) and flag.takes_many:
        for part in value:
            _check_kind(path, flag, key, part)
        return [flag.name, *map(str, value)]
    if isinstance(value, list) and flag.kind is str and value and all(type(part) is int for part in value):
        value = ",".join(map(str, value))  # a list of layers, which the command line takes as 1,2,3
    if isinstance(value, (list, dict)):
        raise ValueError(f"{path}: {key} {value}: must be a single value (got {_TYPES[type(value)]})")
    _check_kind(path, flag, key, value)
    return [f"{flag.name}={value}"]


_KINDS = {int: "a whole number", float: "a number", str: "text"}
_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
}


def _check_kind(path: str, flag: Flag, key: str, value: Any) -> None:
    """Raises `ValueError` unless a value can be converted to the flag's type."""
    found = f"(got {_TYPES.get(type(value), type(value).__name__)})"
    if flag.choices:
        wanted, fits = f"one of {', '.join(flag.choices)}", value in flag.choices
    else:
        wanted, fits = _KINDS.get(flag.kind, flag.kind.__name__), not isinstance(value, (bool, list, dict))
        try:
            # Convert the text instead of comparing types: YAML 1.1 reads 1e-4 as a text.
            flag.kind(str(value))
        except (TypeError, ValueError):
            fits = False
    if not fits:
        raise ValueError(f"{path}: {key} {value}: must be {wanted} {found}")


def _read(path: str, sections: Container[str]) -> Iterator[tuple[str | None, str, Any]]:
    """Yields (section or None, key, value)."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML: {error}") from None
    if content is None:
        return
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must be a mapping of flags (got {type(content).__name__})")
    for key, value in content.items():
        if key in sections and isinstance(value, dict):
            yield from _read_section(key, value, sections)
        else:
            yield None, str(key), value


def _read_section(
    section: str, values: Mapping[Any, Any], sections: Container[str]
) -> Iterator[tuple[str, str, Any]]:
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            yield from _read_section(key, value, sections)
        else:
            yield section, str(key), value
