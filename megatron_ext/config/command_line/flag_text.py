"""Reads and prints text as UTF-8, whatever the locale.

If no locale is set (LC_ALL=C, or a minimal container), Python may use ASCII for the command line and the
standard streams.
"""

import codecs
import locale
import os
import sys
from pathlib import Path

STANDARD_INPUT = "-"
_ERRORS = "megatron_ext.escaped"


def argument_text(flag: str, argument: str) -> str:
    """Returns a command-line argument decoded as UTF-8.

    Args:
        flag: the flag of the argument, for error messages.
        argument: the argument as Python decoded it; bytes that the locale cannot decode are surrogate escapes.

    Raises:
        ValueError: the argument is not UTF-8.
    """
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError(f"{flag} {argument!a}: is not valid UTF-8") from None


def read_lines(flag: str, path: str) -> list[str]:
    """Returns the lines of a UTF-8 file, or of standard input for `-`, without blank lines.

    A byte order mark at the beginning and carriage returns at line ends are dropped.

    Args:
        flag: the flag that gave `path`, for error messages.
        path: the file, or `-`.

    Raises:
        ValueError: the file is not UTF-8.
        OSError: the file cannot be read.
    """
    raw = sys.stdin.buffer.read() if path == STANDARD_INPUT else Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: is not valid UTF-8 (at byte {error.start})") from None
    # Not `str.splitlines`, which also splits at form feeds, U+0085 and U+2028; these are part of a text.
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def use_utf8() -> None:
    """Restarts this program in Python's UTF-8 mode if the locale is ASCII."""
    # `reconfigure` is not enough: it changes only the standard streams, but libraries such as torch open their own
    # files with the locale's encoding.
    asked = sys.flags.utf8_mode or os.environ.get("PYTHONUTF8") == "1"
    if not asked and _is_ascii(locale.getpreferredencoding(False)):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Handles an encoding error: writes undecodable bytes of a file name unchanged, other characters as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    name = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "backslashreplace"
    first = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.lookup_error(name)(first)


def print_any_text() -> None:
    """Lets stdout and stderr print any text: ASCII streams become UTF-8, others escape what they cannot encode."""
    codecs.register_error(_ERRORS, _escaped)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS, **({"encoding": "utf-8"} if _is_ascii(stream.encoding) else {}))
