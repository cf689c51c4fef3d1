"""Derives the command-line flags from the config dataclasses: one flag per field, plus its aliases.

A configuration is a dataclass whose fields are config groups (`RunConfig`), or a single config group. A config group is
a dataclass with the settings of one topic, such as `ModelConfig`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from megatron_ext.config.command_line.field_checks import Spelling, flag_name, literal_values
from megatron_ext.config.megatron_lm.megatron_flags import instead_of

Groups = Mapping[str, type[Any]]
"""Maps the name of a config group (section in a YAML file, heading in `--help`) to the group's dataclass."""

CONFIG, HELP, SHOW_CONFIG = "--config", "--help", "--show-config"
DEFAULTS = "--defaults"
OWN_FLAGS = (CONFIG, HELP, SHOW_CONFIG)
"""Flags that every command line accepts and that set no field of a config group."""

SINGLE_GROUP = "config"
"""Name given to the config group if the configuration is a single group, not a tree of groups."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """The command-line flag that sets one field of a config group."""

    group: str
    """Name of the config group that holds the field."""

    field: str
    """Name of the field; no two groups of a configuration have a field of the same name."""

    names: tuple[str, ...]
    """The flag, followed by its aliases, all spelled with dashes."""

    negations: tuple[str, ...]
    """Flags that set a boolean to false; empty for other types and for a `Switch`."""

    takes_many: bool
    """True if the field holds several values."""

    is_repeated: bool
    """True if the flag is repeated for each value of a field that holds several."""

    kind: type
    """Type of one value: bool, int, float or str."""

    choices: tuple[str, ...]
    """Allowed values; empty if any value is allowed."""

    is_required: bool
    """True if the user must give the flag, because the field has no default."""

    default: object
    """Default of the field, or None."""

    metavar: str | None
    """Placeholder for the value in `--help`; None derives it from the type."""

    without_value: str | None = None
    """Value to use if the flag is given without a value; None if the flag requires one."""

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def name(self) -> str:
        """The flag without its aliases."""
        return self.names[0]


def groups_of(config_type: type[Any]) -> dict[str, type[Any]]:
    """Returns a configuration's groups by name: its fields that are dataclasses; if there are none, the configuration
    itself.
    """
    hints = typing.get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    groups = {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}
    return groups or {SINGLE_GROUP: config_type}


def is_training_run(config_type: type[Any]) -> bool:
    """Returns whether a configuration is for a training run; only training runs accept Megatron-LM's flags."""
    return "training" in groups_of(config_type)


def own_flags(config_type: type[Any]) -> tuple[str, ...]:
    """Returns the flags that a command line accepts and that set no field of a config group."""
    return (*OWN_FLAGS, DEFAULTS) if is_training_run(config_type) else OWN_FLAGS


def flags_of(config_type: type[Any]) -> list[Flag]:
    """Returns the flags of all fields of a configuration.

    Raises:
        TypeError: two fields declare the same flag, which is a bug in the dataclasses.
    """
    flags = [
        _flag(group, field, hints[field.name])
        for group, group_type in groups_of(config_type).items()
        for hints in [typing.get_type_hints(group_type, include_extras=True)]
        for field in _own_fields_first(group_type)
    ]
    owner: dict[str, Flag] = {}
    for flag in flags:
        for spelling in flag.names + flag.negations:
            if spelling in owner:
                raise TypeError(
                    f"{spelling} is declared by two config groups: {owner[spelling].group} and {flag.group}"
                )
            owner[spelling] = flag
    return flags


def _own_fields_first(group_type: type[Any]) -> list[dataclasses.Field[Any]]:
    # Lists a tool's own flags before the flags inherited from a group that several tools share.
    inherited = {name for base in group_type.__mro__[1:] for name in vars(base).get("__annotations__", ())}
    return sorted(dataclasses.fields(group_type), key=lambda field: field.name in inherited)


def known_flags(config_type: type[Any]) -> frozenset[str]:
    """Returns every flag, alias and negation that the command line accepts for a configuration, with dashes."""
    return frozenset(own_flags(config_type)).union(
        *(flag.names + flag.negations for flag in flags_of(config_type))
    )


def with_dashes(flag: str) -> str:
    """Returns the flag with underscores replaced by dashes: `--a_b` becomes `--a-b`."""
    return flag_name(flag.removeprefix("--"))


def missing_flags(groups: Groups, flags: Sequence[Flag], given: Mapping[str, Any]) -> list[str]:
    """Returns all required flags that were not given.

    A flag is required if its field has no default, or if a config group's class method `missing(given)` names it (one
    of several alternatives, or a flag that another flag requires).

    Args:
        groups: config groups by name.
        flags: flags of the groups.
        given: field name and value of every field that has a value from any source.
    """
    missing = [flag.name for flag in flags if flag.is_required and flag.field not in given]
    for group in groups.values():
        if hasattr(group, "missing"):
            missing += group.missing(given)
    return missing


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the most similar known name, or "" if none is similar."""
    near = difflib.get_close_matches(unknown, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def instead_of_unknown(flag: str, known: Iterable[str], shown: str | None = None) -> str:
    """Returns what to use instead of an unknown flag, in brackets, or "" if there is nothing to suggest.

    Args:
        flag: the unknown flag, with dashes.
        known: known names (flags, or keys of a YAML file); the most similar one is suggested.
        shown: the unknown name, spelled like the names in `known`; the default is `flag`.
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
        without_value=spelling.without_value,
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Returns the member types of a union such as `X | None`, or the type itself if it is not a union."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _kind(hint: Any) -> type:
    """Returns the type of a single value: the type inside `| None`, `tuple[...]` or `Literal[...]`."""
    if typing.get_origin(hint) is typing.Literal:
        return str
    parts = [part for part in typing.get_args(hint) if part not in (type(None), ...)]
    return _kind(parts[0]) if parts else typing.cast(type, hint)
