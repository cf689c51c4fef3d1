"""Printing texts and file names where the terminal's encoding does not have all of their characters."""

import codecs
import io
import sys


def print_any_text() -> None:
    r"""Lets standard output take every character: as `\u2028` where its encoding (LC_ALL=C, Latin-1) has it not."""
    codecs.register_error("megatron_ext.escaped", _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="megatron_ext.escaped")


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """A file name's undecodable bytes as they are, anything else as an escape."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)
