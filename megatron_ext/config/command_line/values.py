"""Converts words of the command line, and values from YAML or JSON files, to the type of a field."""

from collections.abc import Sequence
from typing import Any

from megatron_ext.config.command_line.flag_table import Flag

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_TYPES = {**_KINDS, list: "a list", dict: "a section", type(None): "empty"}


def from_words(flag: Flag, spelled: str, words: Sequence[str]) -> Any:
    """Converts the words after a flag: one word, or any number of words if the field holds several values.

    Raises:
        ValueError: a word cannot be converted to the field's type.
    """
    values = [_from_word(flag, spelled, word) for word in words]
    return tuple(values) if flag.takes_many else values[0]


def from_file(flag: Flag, key: str, value: object) -> Any:
    """Converts a value of a YAML or JSON file.

    Strings are converted as on the command line, because YAML 1.1 reads 1e-4 as a string. A list of integers is also
    accepted for a field whose flag takes text such as 1,2,3 (--npt-layers).

    Args:
        flag: flag of the field.
        key: name of the value in the file, for error messages.
        value: the value; not None.

    Raises:
        ValueError: the value cannot be converted to the field's type.
    """
    if isinstance(value, (list, tuple)) and flag.takes_many:
        return tuple(_from_scalar(flag, key, part) for part in value)
    if isinstance(value, list) and flag.kind is str and value and all(type(part) is int for part in value):
        value = ",".join(map(str, value))
    if isinstance(value, (list, dict)):
        raise ValueError(f"{key} {value}: must be a single value (got {_TYPES[type(value)]})")
    scalar = _from_scalar(flag, key, value)
    return (scalar,) if flag.takes_many else scalar


def _from_word(flag: Flag, spelled: str, word: str) -> Any:
    if flag.choices:
        if word not in flag.choices:
            raise ValueError(f"{spelled} {word!r}: must be one of {', '.join(flag.choices)}")
        return word
    try:
        return flag.kind(word)
    except ValueError:
        raise ValueError(f"{spelled} {word!r}: must be {_KINDS[flag.kind]}") from None


def _from_scalar(flag: Flag, key: str, value: object) -> Any:
    if flag.is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"{key} {value}: must be true or false")
        return value
    found = f" (got {_TYPES.get(type(value), type(value).__name__)})"
    if flag.choices:
        if value not in flag.choices:
            found = "" if isinstance(value, str) else found
            raise ValueError(f"{key} {value}: must be one of {', '.join(flag.choices)}{found}")
        return value
    if not isinstance(value, (bool, list, dict, type(None))):
        try:
            return flag.kind(str(value))
        except ValueError:
            pass
    raise ValueError(f"{key} {value}: must be {_KINDS[flag.kind]}{found}")
