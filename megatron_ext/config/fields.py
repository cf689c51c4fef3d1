"""The flags that a set of configuration dataclasses ("concerns") makes: one for every field, plus its aliases.

Everything is read from the dataclasses; there is no list of flags anywhere.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import tyro

Concerns = Mapping[str, type[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One field of one concern, as the command line sees it."""

    concern: str
    """Name of the concern: the section of a YAML file, the group of `--help`."""

    names: tuple[str, ...]
    """Its flag, then the aliases, in dashes."""

    negations: tuple[str, ...]
    """The flags that set a boolean to false; empty for others, and for a boolean that is a negation itself."""

    is_switch: bool
    """True for a boolean."""

    takes_many: bool
    """True for a field of several values."""

    is_text: bool
    """True for a field of one text."""

    is_required: bool
    """True if the field has no default."""

    @property
    def name(self) -> str:
        """The flag that the field's own name makes."""
        return self.names[0]


def flags_of(concerns: Concerns) -> list[Flag]:
    """Returns the flags of all fields.

    Raises:
        TypeError: if two fields claim one flag, which is a defect of the dataclasses.
    """
    flags = [
        _flag(concern, field, hints[field.name])
        for concern, config_type in concerns.items()
        for hints in [typing.get_type_hints(config_type, include_extras=True)]
        for field in dataclasses.fields(config_type)
    ]
    owner: dict[str, Flag] = {}
    for flag in flags:
        for spelling in flag.names + flag.negations:
            if spelling in owner:
                raise TypeError(f"{spelling} is declared by {owner[spelling].concern} and by {flag.concern}")
            owner[spelling] = flag
    return flags


def with_dashes(flag: str) -> str:
    """Returns `--a_b` as `--a-b`."""
    return "--" + flag.removeprefix("--").replace("_", "-")


def given_flags(arguments: Sequence[str], flags: Sequence[Flag]) -> set[str]:
    """Returns the (first) names of the flags that `arguments` hold.

    Raises:
        ValueError: if one is unknown; the message offers the nearest known one.
    """
    name_of = {spelling: flag.name for flag in flags for spelling in flag.names + flag.negations}
    given = set()
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        spelled = argument.partition("=")[0]
        name = name_of.get(with_dashes(spelled))
        if name is None:
            raise ValueError(
                f"unknown flag {spelled}{did_you_mean(with_dashes(spelled), [*name_of, '--config'])}"
            )
        given.add(name)
    return given


def did_you_mean(unknown: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(unknown, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _flag(concern: str, field: "dataclasses.Field[Any]", hint: Any) -> Flag:
    metadata: Sequence[Any] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *metadata = typing.get_args(hint)
    aliases = [alias for item in metadata for alias in getattr(item, "aliases", None) or ()]
    names = (with_dashes(field.name), *aliases)
    has_negations = hint is bool and tyro.conf.FlagCreatePairsOff not in metadata
    return Flag(
        concern=concern,
        names=names,
        negations=tuple("--no-" + name[2:] for name in names) if has_negations else (),
        is_switch=hint is bool,
        takes_many=any(typing.get_origin(part) in (tuple, list) for part in (hint, *typing.get_args(hint))),
        is_text=str in (hint, *typing.get_args(hint)),
        is_required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
    )
