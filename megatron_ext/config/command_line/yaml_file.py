"""Reads a YAML configuration file.

The file holds flags (`num_layers: 12`, spelled with `-` or `_`), or sections of flags, or both. A section is named
after its config group. Sections may be nested (`training: {progressive: ...}`).
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from megatron_ext.config.command_line.flag_table import Flag, Groups, instead_of_unknown, with_dashes
from megatron_ext.config.command_line.values import from_file


def read_yaml(
    path: str,
    groups: Groups,
    flags: Sequence[Flag],
    sections: Mapping[str, Container[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Returns the values in a YAML file by field name, without fields that are null in the file.

    Args:
        path: the YAML file.
        groups: config groups by section name.
        flags: flags of the groups.
        sections: maps the name of a section to further groups whose flags the section may hold.

    Raises:
        ValueError: the file is missing or not a mapping of flags, or it has unknown keys, repeated keys, or values of
            the wrong type; the message lists all of these.
    """
    flag_of = {name: flag for flag in flags for name in flag.names}
    values: dict[str, Any] = {}
    unknown: list[str] = []
    wrong: list[str] = []
    for section, key, value in _read(path, groups):
        flag = flag_of.get(with_dashes(key))
        if flag is None or not _belongs(flag, section, sections):
            known = [n[2:].replace("-", "_") for n, f in flag_of.items() if _belongs(f, section, sections)]
            where = f" in section {section}" if section is not None else ""
            unknown.append(
                f"{key}{where}{instead_of_unknown(with_dashes(key), known, key.replace('-', '_'))}"
            )
        elif flag.field in values:
            wrong.append(f"{key} is given twice")
        else:
            try:
                values[flag.field] = None if value is None else from_file(flag, key, value)
            except ValueError as error:
                values[flag.field] = None
                wrong.append(str(error))
    if unknown:
        wrong.insert(0, f"unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}")
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}")
    return {field: value for field, value in values.items() if value is not None}


def load_yaml(path: str | Path, flag: str = "") -> Any:
    """Returns the content of a YAML file.

    Args:
        path: the YAML file.
        flag: text before the path in error messages: the flag that names the file, and a space; or "".

    Raises:
        ValueError: the file is not YAML; the message is one line with the file, the line and the column.
        OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = _position(content[: error.start].decode("utf-8"))
        raise ValueError(f"{flag}{path}, {where}: not valid YAML: must be in UTF-8") from None
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        reason = f"not valid YAML: {error.problem}"
        if error.context_mark is not None:
            reason += f" ({error.context} that begins at {_at(error.context_mark)})"
        raise ValueError(f"{flag}{path}, {_at(error.problem_mark)}: {reason}") from None
    except yaml.reader.ReaderError as error:
        where = _position(text[: error.position])
        raise ValueError(f"{flag}{path}, {where}: not valid YAML: {error.reason}") from None


def _at(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _position(before: str) -> str:
    """Returns the line and column of the character that follows the text `before`."""
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _belongs(flag: Flag, section: str | None, sections: Mapping[str, Container[str]]) -> bool:
    return section in (None, flag.group) or flag.group in sections.get(section or "", ())


def _read(path: str, sections: Container[str]) -> Iterator[tuple[str | None, str, Any]]:
    """Yields every entry of the file as (section, key, value); the section is None for a key outside all sections."""
    try:
        content = load_yaml(path, "--config ")
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
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
