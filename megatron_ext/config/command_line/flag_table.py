"""The flags that a configuration's dataclasses make: one for every field, plus its aliases.

A configuration is a tree, a dataclass whose fields are groups (`RunConfig`), or one group alone.
Everything is read from the dataclasses; there is no list of flags anywhere.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from megatron_ext.config.command_line.field_checks import Spelling, flag_name, literal_values
from megatron_ext.config.command_line.megatron_flags import instead_of

Groups = Mapping[str, type[Any]]
"""Name of a group (section of a YAML file, heading of `--help`) -> its dataclass."""

CONFIG, HELP, SHOW_CONFIG = "--config", "--help", "--show-config"
OWN_FLAGS = (CONFIG, HELP, SHOW_CONFIG)
"""Flags of every command line, which no group declares."""

SINGLE_GROUP = "config"
"""Name of the group where the configuration is one group alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One field of one group, as the command line sees it."""

    group: str
    """Name of the group."""

    field: str
    """Name of the field. No two groups of a configuration share one."""

    names: tuple[str, ...]
    """Its flag, then the aliases, in dashes."""

    negations: tuple[str, ...]
    """The flags that set a boolean to false; empty for others, and for a boolean that is a negation itself."""

    takes_many: bool
    """True for a field of several values."""

    is_repeated: bool
    """True for a field of several values, each given with a flag of its own."""

    kind: type
    """What a value is: bool, int, float or str (choices are texts); of several values each."""

    choices: tuple[str, ...]
    """The values that are allowed; empty where any is."""

    is_required: bool
    """True if the field has no default."""

    default: object
    """The field's default; None where it has none."""

    metavar: str | None
    """What `--help` prints for the value, where that does not follow from the type."""

    @property
    def is_switch(self) -> bool:
        """True for a boolean."""
        return self.kind is bool

    @property
    def name(self) -> str:
        """The flag that the field's own name makes."""
        return self.names[0]


def groups_of(config_type: type[Any]) -> dict[str, type[Any]]:
    """Returns the groups of a configuration: the fields that are dataclasses, or the configuration as the only one."""
    hints = typing.get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    groups = {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}
    return groups or {SINGLE_GROUP: config_type}


def flags_of(config_type: type[Any]) -> list[Flag]:
    """Returns the flags of all fields of a configuration.

    Raises:
        TypeError: if two fields claim one flag, which is a defect of the dataclasses.
    """
    flags = [
        _flag(group, field, hints[field.name])
        for group, group_type in groups_of(config_type).items()
        for hints in [typing.get_type_hints(group_type, include_extras=True)]
        for field in dataclasses.fields(group_type)
    ]
    owner: dict[str, Flag] = {}
    for flag in flags:
        for spelling in flag.names + flag.negations:
            if spelling in owner:
                raise TypeError(f"{spelling} is declared by {owner[spelling].group} and by {flag.group}")
            owner[spelling] = flag
    return flags


def known_flags(config_type: type[Any]) -> frozenset[str]:
    """Returns every spelling that the command line accepts for a configuration, in dashes."""
    return frozenset(OWN_FLAGS).union(*(flag.names + flag.negations for flag in flags_of(config_type)))


def with_dashes(flag: str) -> str:
    """Returns `--a_b` as `--a-b`."""
    return flag_name(flag.removeprefix("--"))


def missing_flags(groups: Groups, flags: Sequence[Flag], given: Mapping[str, Any]) -> list[str]:
    """Returns all flags that a command lacks: those without a default, and what groups ask for besides.

    A group with the class method `missing(given)` gives its own, of which any one of several may be needed.

    Args:
        groups: the dataclasses by name.
        flags: their flags.
        given: field's name -> value, of all fields that have one from anywhere.
    """
    missing = [flag.name for flag in flags if flag.is_required and flag.field not in given]
    for group in groups.values():
        if hasattr(group, "missing"):
            missing += group.missing(given)
    return missing


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(unknown, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def instead_of_unknown(flag: str, known: Iterable[str], shown: str | None = None) -> str:
    """Returns, in brackets, what to use in place of an unknown flag; nothing where nothing is known.

    Args:
        flag: in dashes.
        known: names of which the nearest is proposed.
        shown: the unknown name as it compares with `known`; the flag by default.
    """
    words = instead_of(flag)
    return f" ({words})" if words is not None else did_you_mean(shown or flag, known)


def _flag(group: str, field: "dataclasses.Field[Any]", hint: Any) -> Flag:
    spelling = Spelling()
    if typing.get_origin(hint) is Annotated:
        hint, spelling = typing.get_args(hint)
    names = (flag_name(field.name), *spelling.aliases)
    is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    return Flag(
        group=group,
        field=field.name,
        names=names,
        negations=tuple("--no-" + name[2:] for name in names)
        if hint is bool and spelling.has_negation
        else (),
        takes_many=any(typing.get_origin(part) is tuple for part in _alternatives(hint)),
        is_repeated=spelling.is_repeated,
        kind=_kind(hint),
        choices=literal_values(hint),
        is_required=is_required,
        default=None if field.default is dataclasses.MISSING else field.default,
        metavar=spelling.metavar,
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The parts of `X | None`; of another type the type."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _kind(hint: Any) -> type:
    """The type of a value under `| None`, `tuple[...]` and `Literal[...]`."""
    if typing.get_origin(hint) is typing.Literal:
        return str
    parts = [part for part in typing.get_args(hint) if part not in (type(None), ...)]
    return _kind(parts[0]) if parts else typing.cast(type, hint)
