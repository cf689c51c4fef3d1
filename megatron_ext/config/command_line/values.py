"""The value of a field, from a word of the command line or from a file: checked and converted by the field's type."""

from collections.abc import Sequence
from typing import Any

from megatron_ext.config.command_line.flag_table import Flag

_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_TYPES = {**_KINDS, list: "a list", dict: "a section", type(None): "empty"}


def from_words(flag: Flag, spelled: str, words: Sequence[str]) -> Any:
    """Returns the field's value from the words after its flag, one or, for a field of several values, any number.

    Raises:
        ValueError: a word is not of the field's type.
    """
    values = [_from_word(flag, spelled, word) for word in words]
    return tuple(values) if flag.takes_many else values[0]


def from_file(flag: Flag, key: str, value: object) -> Any:
    """Returns the field's value from that of a YAML or JSON file.

    A text is read as on the command line, because YAML takes 1e-4 for one. A list of whole numbers may stand for a text
    of numbers with commas between, as the layers of --npt-layers.

    Args:
        flag: of the field.
        key: as the file calls it, for errors.
        value: not None.

    Raises:
        ValueError: it is not of the field's type.
    """
    if isinstance(value, (list, tuple)) and flag.takes_many:
        return tuple(_from_scalar(flag, key, part) for part in value)
    if isinstance(value, list) and flag.kind is str and value and all(type(part) is int for part in value):
        value = ",".join(map(str, value))
    if isinstance(value, (list, dict)):
        raise ValueError(f"{key} {value}: must be a single value, it is {_TYPES[type(value)]}")
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
            raise ValueError(f"{key} {value}: is neither true nor false")
        return value
    found = f"it is {_TYPES.get(type(value), type(value).__name__)}"
    if flag.choices:
        if value not in flag.choices:
            raise ValueError(f"{key} {value}: must be one of {', '.join(flag.choices)}, {found}")
        return value
    if not isinstance(value, (bool, list, dict, type(None))):
        try:
            return flag.kind(str(value))
        except ValueError:
            pass
    raise ValueError(f"{key} {value}: must be {_KINDS[flag.kind]}, {found}")
