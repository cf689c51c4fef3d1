"""Derives the command-line flags from the config groups: one flag per field, plus its aliases."""

import dataclasses
import difflib
import typing
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Annotated, Any

import tyro

from megatron_ext.config.command_line.field_checks import literal_values
from megatron_ext.config.command_line.megatron_flags import instead_of

ConfigGroups = Mapping[str, type[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """The flag of one field of a config group."""

    group: str
    """Name of the group: the section in a YAML file and the heading in `--help`."""

    names: tuple[str, ...]
    """The flag, then its aliases, all with dashes."""

    negations: tuple[str, ...]
    """Flags that set a boolean to false; empty for other types and for a `Switch`."""

    takes_many: bool
    """Whether the flag takes several values."""

    kind: type
    """Type of one value: bool, int, float or str."""

    choices: tuple[str, ...]
    """Allowed values; empty if any value is."""

    is_required: bool
    """Whether the field has no default."""

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def name(self) -> str:
        """The flag without its aliases."""
        return self.names[0]


def flags_of(groups: ConfigGroups) -> list[Flag]:
    """Returns the flags of all fields.

    Raises:
        TypeError: two fields have the same flag, which is a defect of the dataclasses.
    """
    flags = [
        _flag(group, field, hints[field.name])
        for group, config_type in groups.items()
        for hints in [typing.get_type_hints(config_type, include_extras=True)]
        for field in dataclasses.fields(config_type)
    ]
    owner: dict[str, Flag] = {}
    for flag in flags:
        for spelling in flag.names + flag.negations:
            if spelling in owner:
                raise TypeError(f"{spelling} is declared by {owner[spelling].group} and by {flag.group}")
            owner[spelling] = flag
    return flags


def with_dashes(flag: str) -> str:
    """Returns `--a_b` as `--a-b`."""
    return "--" + flag.removeprefix("--").replace("_", "-")


def given_flags(arguments: Sequence[str], flags: Sequence[Flag]) -> set[str]:
    """Returns the `Flag.name` of every flag in `arguments`.

    Raises:
        ValueError: flags are unknown; the message lists all of them, each with what to use instead.
    """
    name_of = {spelling: flag.name for flag in flags for spelling in flag.names + flag.negations}
    given = set()
    unknown: dict[str, None] = {}
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        spelled = argument.partition("=")[0]
        name = name_of.get(with_dashes(spelled))
        if name is None:
            unknown[spelled] = None
        else:
            given.add(name)
    if unknown:
        known = [*name_of, "--config"]
        told = ", ".join(spelled + _instead_of(with_dashes(spelled), known) for spelled in unknown)
        raise ValueError(f"unknown flag{'s' if len(unknown) > 1 else ''} {told}")
    return given


def missing_flags(
    groups: ConfigGroups, flags: Sequence[Flag], given: Container[str], values: Mapping[str, str]
) -> list[str]:
    """Returns all required flags that a command lacks.

    These are flags without a default, and those that a group's class method `missing(given, values)` returns, such as
    "one of several" or "required with --tokenizer-type X".

    Args:
        groups: name -> dataclass.
        flags: flags of the groups.
        given: `Flag.name` of the flags that are given.
        values: field name -> text, for the given flags that take one value.
    """
    missing = [flag.name for flag in flags if flag.is_required and flag.name not in given]
    for group in groups.values():
        if hasattr(group, "missing"):
            missing += group.missing(given, values)
    return missing


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the most similar known name, or "" if none is similar."""
    near = difflib.get_close_matches(unknown, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _kind(hint: Any) -> type:
    """The type of one value inside `| None`, `tuple[...]` and `Literal[...]`."""
    if typing.get_origin(hint) is typing.Literal:
        return str
    parts = [part for part in typing.get_args(hint) if part not in (type(None), ...)]
    return _kind(parts[0]) if parts else hint


def _instead_of(unknown: str, known: Iterable[str]) -> str:
    words = instead_of(unknown)
    return f" ({words})" if words is not None else did_you_mean(unknown, known)


def _flag(group: str, field: "dataclasses.Field[Any]", hint: Any) -> Flag:
    metadata: Sequence[Any] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *metadata = typing.get_args(hint)
    aliases = [alias for item in metadata for alias in getattr(item, "aliases", None) or ()]
    names = (with_dashes(field.name), *aliases)
    has_negations = hint is bool and tyro.conf.FlagCreatePairsOff not in metadata
    return Flag(
        group=group,
        names=names,
        negations=tuple("--no-" + name[2:] for name in names) if has_negations else (),
        takes_many=any(typing.get_origin(part) in (tuple, list) for part in (hint, *typing.get_args(hint))),
        kind=_kind(hint),
        choices=literal_values(hint),
        is_required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
    )
