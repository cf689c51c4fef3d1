"""How a user's mistake ends a process: one `error: ...` line on rank 0, exit code 2 on every rank.

Only errors that name what the user can change are treated so. Anything else is a defect and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
"""Exit code after a user's mistake."""

USER_ERRORS = (ValueError, OSError)
"""What the library raises for a user's mistake; file and permission errors are kinds of `OSError`."""


def exit_with_error(message: str) -> NoReturn:
    """Prints `error: message` as one line on rank 0 and leaves with exit code 2 on every rank."""
    if int(os.environ.get("RANK") or 0) == 0:
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(EXIT_USER_ERROR)


def describe(error: BaseException) -> str:
    """Returns a user's mistake in words: the message, for an `OSError` of the system with the file's name."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs an entry point and exits with its code; use as `if __name__ == "__main__": run_main(main)`.

    Args:
        main: takes nothing, returns an exit code or None for 0.
    """
    try:
        code = main()
    except USER_ERRORS as error:
        if os.environ.get("MEGATRON_EXT_TRACEBACK"):
            raise
        exit_with_error(describe(error))
    raise SystemExit(code or 0)
