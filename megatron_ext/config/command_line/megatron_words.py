"""Takes Megatron-LM's own flags out of a command line, so that its launch scripts run here unchanged.

A flag without effect is removed and reported, a renamed flag is replaced, and an unsupported flag is an error. This
package's own flags stay unchanged, except for values that only Megatron-LM has (`--attention-backend fused`).
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from megatron_ext.config.command_line.argument_words import by_flag, check_end
from megatron_ext.config.command_line.flag_table import Flag, with_dashes
from megatron_ext.config.megatron_lm.ignored_flags import IGNORED, Ignored
from megatron_ext.config.megatron_lm.megatron_flags import RENAMED, why_refused

FLAGS_REPORTED = "MEGATRON_EXT_FLAGS_REPORTED"
"""Environment variable set for a child process, if its parent has already reported the flags without effect."""


@dataclasses.dataclass
class SortedWords:
    """The words of a command line after Megatron-LM's flags were taken out."""

    arguments: list[str] = dataclasses.field(default_factory=list)
    """The remaining words: this package's flags with their values, and unknown flags."""

    ignored: list[str] = dataclasses.field(default_factory=list)
    """Flags without effect, with their values."""

    refused: list[str] = dataclasses.field(default_factory=list)
    """Unsupported flags with their values, each followed by advice on what to do instead."""


def sort_megatron_flags(arguments: Sequence[str], flags: Sequence[Flag]) -> SortedWords:
    """Takes out Megatron-LM's flags.

    Args:
        arguments: the words of the command line.
        flags: this package's flags.

    Raises:
        ValueError: the first word is not a flag, or a flag without effect has too few or too many values.
    """
    flag_of = {spelling: flag for flag in flags for spelling in flag.names + flag.negations}
    found = SortedWords()
    for spelled, words in by_flag(arguments):
        name = with_dashes(spelled)
        own, ignored = flag_of.get(name), IGNORED.get(name)
        given = " ".join((spelled, *words))
        if own is not None and not (ignored and words and set(words) <= {*ignored.harmless} - {*own.choices}):
            found.arguments += [spelled, *words]
        elif name in RENAMED:
            found.arguments += [*RENAMED[name], *words]
        elif ignored is not None:
            _check_count(ignored, spelled, words)
            if ignored.allows(words):
                found.ignored.append(given)
            else:
                found.refused.append(f"{given} ({ignored.limits})")
        elif (why := why_refused(name)) is not None:
            found.refused.append(f"{given} ({why})")
        else:
            found.arguments += [spelled, *words]
    return found


def _check_count(ignored: Ignored, spelled: str, words: Sequence[str]) -> None:
    if ignored.takes != "values":
        check_end(spelled, words, 0 if ignored.takes == "nothing" else 1)
    if ignored.takes != "nothing" and not words:
        raise ValueError(f"{spelled}: requires a value")


def report_ignored(ignored: Sequence[str]) -> None:
    """Prints the flags without effect, if any, as one line on the standard error of rank 0."""
    if ignored and int(os.environ.get("RANK") or 0) == 0 and FLAGS_REPORTED not in os.environ:
        print(
            f"flags of Megatron-LM without effect here: {', '.join(ignored)} (docs/megatron_lm_flags.md says why)",
            file=sys.stderr,
            flush=True,
        )
