"""Text from outside, whatever the locale: all text is UTF-8, and only a line feed ends a line.

Without a locale (LC_ALL=C, a bare container) Python may take ASCII for the command line and the standard streams, and
`str.splitlines` also cuts at form feeds, U+0085 and U+2028, which belong to a text.
"""

import codecs
import locale
import os
import sys
from pathlib import Path

STANDARD_INPUT = "-"
_ERRORS = "megatron_ext.escaped"


def argument_text(flag: str, argument: str) -> str:
    """Returns the text of a command-line argument.

    Args:
        flag: its flag, for errors.
        argument: as Python has decoded it: bytes that its locale does not know come as lone surrogates.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError(f"{flag} {argument!a}: is not UTF-8") from None


def read_lines(flag: str, path: str) -> list[str]:
    """Returns the lines of a UTF-8 file, or of standard input for `-`, that hold more than white space.

    A byte order mark at the beginning is dropped, as is a carriage return at a line's end.

    Args:
        flag: the flag that names the file, for errors.
        path: the file.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it cannot be read.
    """
    raw = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: is not UTF-8 (byte {error.start})") from None
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def use_utf8() -> None:
    """Starts this program anew in Python's UTF-8 mode where the locale is ASCII.

    Libraries, torch among them, read files of their own in the locale's encoding.
    """
    asked = sys.flags.utf8_mode or os.environ.get("PYTHONUTF8") == "1"
    if not asked and _is_ascii(locale.getpreferredencoding(False)):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """A byte of a file's name that the locale did not know is written as it was; what a stream lacks, as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    name = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "backslashreplace"
    first = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.lookup_error(name)(first)


def print_any_text() -> None:
    """Lets the standard streams print any text: ASCII ones become UTF-8, others escape what they lack."""
    codecs.register_error(_ERRORS, _escaped)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS, **({"encoding": "utf-8"} if _is_ascii(stream.encoding) else {}))
