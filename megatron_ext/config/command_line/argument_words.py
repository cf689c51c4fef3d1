"""Parses the words of a command line into values of config fields."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_ext.config.command_line.flag_table import OWN_FLAGS, Flag, instead_of_unknown, with_dashes
from megatron_ext.config.command_line.values import from_words


def read_arguments(
    arguments: Sequence[str], flags: Sequence[Flag], refused: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns a dictionary from field name to value for all given flags; the last occurrence of a flag wins.

    Args:
        arguments: the words of the command line, without the flags in `flag_table.OWN_FLAGS`.
        flags: all known flags.
        refused: error texts for words that were removed from `arguments` earlier.

    Raises:
        ValueError: `refused` is not empty, a flag is unknown, a value is missing or has the wrong type, or a word
            does not follow a flag. The message lists all errors, and suggests a replacement for an unknown flag.
    """
    flag_of = {spelling: flag for flag in flags for spelling in flag.names + flag.negations}
    wrong = [*refused, *_unknown(arguments, list(flag_of))]
    given: dict[str, Any] = {}
    for spelled, words in by_flag(arguments):
        flag = flag_of.get(with_dashes(spelled))
        if flag is not None:
            try:
                given[flag.field] = _value(flag, spelled, words, given.get(flag.field, ()))
            except ValueError as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    return given


def _value(flag: Flag, spelled: str, words: Sequence[str], before: tuple[Any, ...]) -> Any:
    """Returns the value of one occurrence of a flag; `before` holds the values of its earlier occurrences if the flag
    may be repeated.
    """
    if flag.is_switch:
        check_end(spelled, words, 0)
        return with_dashes(spelled) in flag.names
    if not flag.takes_many or flag.is_repeated:
        if not words and flag.without_value is not None:
            words = [flag.without_value]
        if not words:
            raise ValueError(f"{spelled}: requires a value")
        check_end(spelled, words, 1)
    value = from_words(flag, spelled, words)
    return (*before, *value) if flag.is_repeated else value


def _unknown(arguments: Sequence[str], known: list[str]) -> Iterator[str]:
    """Yields one error text that names all unknown flags, if there are any."""
    unknown = {
        spelled: with_dashes(spelled) if spelled.startswith("--") else f"-{spelled}"
        for spelled in (argument.partition("=")[0] for argument in arguments if _is_flag(argument))
        if not spelled.startswith("--") or with_dashes(spelled) not in known
    }
    if unknown:
        named = (
            spelled + instead_of_unknown(flag, [*known, *OWN_FLAGS]) for spelled, flag in unknown.items()
        )
        yield f"unknown flag{'s' if len(unknown) > 1 else ''} {', '.join(named)}"


def _is_flag(word: str) -> bool:
    """Returns whether a word is a flag: --x or -x, but not -1, a single -, or other text that begins with a dash."""
    return word.startswith("--") or re.fullmatch(r"-[A-Za-z]\S*", word) is not None


def by_flag(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields every flag as the user spelled it, together with the words between it and the next flag.

    Raises:
        ValueError: the first word is not a flag.
    """
    spelled: str | None = None
    words: list[str] = []
    for argument in arguments:
        if not argument.startswith("--"):
            if spelled is None:
                raise ValueError(f"unexpected argument {argument}: a value must follow its flag")
            words.append(argument)
            continue
        if spelled is not None:
            yield spelled, words
        spelled, equals, value = argument.partition("=")
        words = [value] if equals else []
    if spelled is not None:
        yield spelled, words


def check_end(spelled: str, words: Sequence[str], count: int) -> None:
    """Raises `ValueError` if more than `count` (0 or 1) words follow a flag."""
    if len(words) > count:
        takes = "no value" if count == 0 else "one value"
        raise ValueError(f"unexpected argument {words[count]} ({spelled} takes {takes})")
