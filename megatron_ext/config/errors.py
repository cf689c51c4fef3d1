"""How a user's mistake ends a process: one `error: ...` line on the first rank of a host, exit code 2 on every rank.

Only errors that tell what the user can change are treated so. Anything else is a defect and keeps its traceback;
`MEGATRON_EXT_TRACEBACK=1` shows the traceback of the others too.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_ext.config.text import print_any_text, use_utf8

EXIT_USER_ERROR = 2
"""Exit code after a user's mistake."""

USER_ERRORS = (ValueError, OSError)
"""What the library raises for a user's mistake; missing files and permissions are kinds of `OSError`."""

Main = Callable[[], int | None]


def exit_with_error(message: str) -> NoReturn:
    """Prints `error: message` as one line on the first rank of every host and leaves with exit code 2 on every rank.

    Every host speaks, because a file may be missing on one of them alone.
    """
    if int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0) == 0:
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR)


def describe(error: BaseException) -> str:
    """Returns a user's mistake in words: the message, and for an `OSError` of the system the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def main_guard(main: Main) -> Main:
    """Wraps an entry point so that a user's mistake ends it with one line and exit code 2."""

    @functools.wraps(main)
    def guarded() -> int | None:
        try:
            return main()
        except BrokenPipeError:
            # Whoever read our output has left (`--help | head`); nothing of it is a mistake.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except USER_ERRORS as error:
            if os.environ.get("MEGATRON_EXT_TRACEBACK"):
                raise
            exit_with_error(describe(error))

    return guarded


def run_main(main: Main) -> NoReturn:
    """Runs an entry point and exits with its code (None is 0); use as `if __name__ == "__main__": run_main(main)`."""
    use_utf8()
    print_any_text()
    raise SystemExit(main_guard(main)() or 0)
