"""Helpers to declare and check the fields of config dataclasses.

A field's name determines its flag (`num_layers` becomes `--num-layers`). `flag()` adds aliases. The `check_*` functions
raise a `ValueError` whose one-line message is shown to the user.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
    """Settings of a field's flag that do not follow from the field's name and type."""

    aliases: tuple[str, ...] = ()
    """Further flags that set the field, spelled with dashes (`--learning-rate`)."""

    metavar: str | None = None
    """Placeholder that `--help` prints for the value; None derives it from the field's type."""

    has_negation: bool = True
    """For a boolean: whether `--x` also has a flag `--no-x` that turns it off."""

    is_repeated: bool = False
    """For a field with several values: whether the flag is repeated for each value."""

    without_value: str | None = None
    """Value to use if the flag is given without a value; None if the flag requires one."""


Switch = Annotated[bool, Spelling(has_negation=False)]
"""A boolean without a `--no-` flag, in most cases because its name is already a negation (`--no-load-optim`)."""

_LARGEST_FP32 = (2 - 2**-23) * 2.0**127


_Value = typing.TypeVar("_Value")

Repeated = Annotated[tuple[_Value, ...], Spelling(is_repeated=True)]
"""Several values, each given by repeating the flag (`--stop A --stop B`)."""


def one_of_two(config: object, name: str, negation: str) -> bool | None:
    """Returns True if the switch `name` is set, False if `negation` is set, and None if neither is.

    Raises:
        ValueError: both are set.
    """
    if getattr(config, name) and getattr(config, negation):
        raise ValueError(f"{flag_name(name)}, {flag_name(negation)}: give only one of them")
    return True if getattr(config, name) else False if getattr(config, negation) else None


def flag_name(field_name: str) -> str:
    """Returns the command-line flag of a dataclass field."""
    return "--" + field_name.replace("_", "-")


def flag(*, aliases: Sequence[str] = (), metavar: str | None = None) -> Spelling:
    """Returns metadata for a field's `Annotated[...]` type that adds aliases or a placeholder to the field's flag.

    Args:
        aliases: further names of the flag, with `-` or `_`, such as `--learning_rate`.
        metavar: placeholder for the value in `--help`; "" or None derives it from the field's type.
    """
    return Spelling(aliases=tuple(flag_name(alias.lstrip("-")) for alias in aliases), metavar=metavar)


def check_at_least(config: object, minimum: float, *names: str) -> None:
    """Raises `ValueError` for the first named field that is not None and lies below `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{flag_name(name)} {value}: must be at least {minimum}")


def check_at_most(config: object, maximum: float, *names: str) -> None:
    """Raises `ValueError` for the first named field that is not None and lies above `maximum`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value <= maximum:
            raise ValueError(f"{flag_name(name)} {value}: must be at most {maximum}")


def check_numbers(config: "DataclassInstance") -> None:
    """Raises `ValueError` for the first float that is not finite in fp32, or integer that does not fit in 64 bits.

    `parse` calls it for every config group. Groups that are also built in Python call it in their `__post_init__`.
    """
    for field in dataclasses.fields(config):
        held = getattr(config, field.name)
        for value in held if isinstance(held, tuple) else (held,):
            if isinstance(value, float) and not abs(value) <= _LARGEST_FP32:
                raise ValueError(
                    f"{flag_name(field.name)} {value}: must be a finite number in the range of fp32"
                )
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError(f"{flag_name(field.name)} {value}: must fit in 64 bits")


def check_positive(config: object, *names: str) -> None:
    """Raises `ValueError` for the first named field that is not None and not above zero."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{flag_name(name)} {value}: must be above 0")


def check_fraction(config: object, *names: str, closed: bool = False) -> None:
    """Raises `ValueError` for the first named field that is not None and outside [0, 1) ([0, 1] if `closed`)."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not (0 <= value <= 1 if closed else 0 <= value < 1):
            raise ValueError(f"{flag_name(name)} {value}: must lie in [0, 1{']' if closed else ')'}")


def check_choices(config: "DataclassInstance") -> None:
    """Raises `ValueError` for the first field of type `Literal[...]` whose value is not one of the choices.

    Values from the command line are checked when it is parsed; this check is for groups built in Python or from JSON.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        choices = literal_values(hints[field.name])
        value = getattr(config, field.name)
        if choices and value is not None and value not in choices:
            raise ValueError(
                f"{flag_name(field.name)} {value}: must be one of {', '.join(map(str, choices))}"
            )


def literal_values(hint: Any) -> tuple[Any, ...]:
    """Returns the choices of a type that is or contains a `Literal[...]`; empty for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return tuple(value for arg in typing.get_args(hint) for value in literal_values(arg))
