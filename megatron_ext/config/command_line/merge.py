"""Merges the values of a configuration field by field from several sources, and records where each value came from.

The sources, from the highest precedence to the lowest:

    flag  >  YAML file (--config)  >  values that the program finds  >  --defaults megatron  >  default of the field

With --use-checkpoint-args, the model's shape in the checkpoint takes precedence over the flags.

The given flags may name a mode, a weights file or a checkpoint, in which the program finds further values. Each of
these sources is a `Found`; a later one overrides an earlier one. `pretrain_npt.py` reads the mode, then the weights
file, then the checkpoint; `pretrain_progressive.py` reads the description of the stacks, then the training run in
--save.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_ext.config.command_line.field_checks import check_numbers, flag_name
from megatron_ext.config.command_line.flag_table import Flag, groups_of
from megatron_ext.config.command_line.values import from_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a field's value."""

    text: str
    """Description of the source, as `--show-config` prints it."""

    is_yaml: bool = False
    """True if the source is the YAML file of --config."""


FLAG = Source("flag")
DEFAULT = Source("default")
DERIVED = Source("follows from others")
"""Source of a field that was not set but whose value, computed from other fields, differs from the default."""

Sources = Mapping[str, Source]
"""Maps each field that differs from its default to the source of its value."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Values that a program finds, for example in a checkpoint.

    They apply to fields that the user has not set; with `wins`, to all fields.
    """

    source: str
    """Description of the source, for `--show-config` and error messages."""

    sections: Mapping[str, Mapping[str, Any]]
    """Values by group name and field name, as Python or JSON values; None leaves the field unset."""

    wins: bool = False
    """True if the values replace those that the user has set; None then resets the field to its default."""

    def values(self, flags: Iterable[Flag]) -> dict[str, Any]:
        """Returns the values by field name, each converted to the field's type.

        Raises:
            ValueError: a value cannot be converted.
        """
        flag_of = {(flag.group, flag.field): flag for flag in flags}
        try:
            return {
                field: from_file(flag_of[group, field], field, value)
                for group, values in self.sections.items()
                for field, value in values.items()
                if value is not None
            }
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None


@dataclasses.dataclass
class Merged:
    """Collects values with their sources; the first value added for a field is kept."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)

    def add(self, source: Source, values: Mapping[str, Any]) -> None:
        """Adds a value for each field that has none yet."""
        new = {field: value for field, value in values.items() if field not in self.values}
        self.values |= new
        self.sources |= dict.fromkeys(new, source)

    def replace(self, source: Source, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Replaces the values of fields; None removes a field's value.

        Returns:
            For each field whose value has changed, the old value and the new one.
        """
        changed = {
            field: (self.values[field], value)
            for field, value in values.items()
            if field in self.values and self.values[field] != value
        }
        for field in values.keys() & self.values.keys():
            del self.values[field], self.sources[field]
        self.add(source, {field: value for field, value in values.items() if value is not None})
        return changed


def _check_kept(group: "DataclassInstance", merged: Merged) -> None:
    """Raises `ValueError` if a preset of the group has overridden a value that the user has set."""
    for field in getattr(group, "SET_BY_PRESET", ()):
        source = merged.sources.get(field)
        if source is None or not (source == FLAG or source.is_yaml):
            continue
        given, kept = merged.values[field], getattr(group, field)
        if kept != given:
            flag = flag_name(field)
            raise ValueError(f"{flag} {given}: the preset sets it to {kept}; omit {flag} or the preset")


def build(config_type: type[T], merged: Merged) -> T:
    """Builds and checks the configuration; fields without a value get their default.

    Raises:
        ValueError: a value is invalid.
    """
    groups = {
        name: group(
            **{f.name: merged.values[f.name] for f in dataclasses.fields(group) if f.name in merged.values}
        )
        for name, group in groups_of(config_type).items()
    }
    for group in groups.values():
        check_numbers(group)
        _check_kept(group, merged)
    (first, *_) = groups.values()
    if isinstance(first, config_type):  # the configuration is a single group
        return first
    names = {field.name for field in dataclasses.fields(config_type)}
    more = {"sources": merged.sources} if "sources" in names else {}
    return config_type(**groups, **more)


def name_yaml(message: str, sources: Sources) -> str:
    """Returns an error message, followed by a list of the flags in it that were set by the YAML file."""
    named = {}
    for flag in re.findall(r"--([\w-]+)", message):
        field = flag.replace("-", "_")
        for name in (field, field.removeprefix("no_")):
            if name in sources and sources[name].is_yaml:
                named[name] = f"{name} in {sources[name].text}"
    return f"{message} ({', '.join(named.values())})" if named else message


def format_sources(config: "DataclassInstance", sources: Sources) -> str:
    """Returns the text of `--show-config`: every field with its value and source, by config group."""
    groups = {name: getattr(config, name, config) for name in groups_of(type(config))}
    rows = {
        name: [
            (field.name, _text(value := getattr(group, field.name)), _source(field, value, sources).text)
            for field in dataclasses.fields(group)
        ]
        for name, group in groups.items()
    }
    return "\n".join(line for name, found in rows.items() for line in (f"{name}:", *_table(found)))


def _source(field: "dataclasses.Field[Any]", value: object, sources: Sources) -> Source:
    return sources.get(field.name, DEFAULT if value == field.default else DERIVED)


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    widths[1] = min(widths[1], 40)
    return [f"  {field:<{widths[0]}}  {value:<{widths[1]}}  {source}" for field, value, source in rows]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
