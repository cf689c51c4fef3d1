"""Ends an entry point after an error: prints one `error: ...` line if the user can fix it, a traceback if it is a bug.

Each kind of error, what is printed, and the exit code:

    user error (ValueError, OSError)        one line on the first rank of each host, exit code 2 on every rank
    another process of the run died         one line, exit code 1
    Ctrl-C before training has started      one line, exit code 130
    any other exception (a bug)             traceback, exit code 1

With `MEGATRON_EXT_TRACEBACK=1` in the environment, the first two cases show their traceback as well.
"""

import contextlib
import functools
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from megatron_ext.config.command_line.flag_text import print_any_text, use_utf8

EXIT_UNEXPECTED = 1
"""Exit code after a bug, or after another process of the run has died."""

EXIT_USER_ERROR = 2
"""Exit code after an error that the user can fix."""

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C: 128 plus the signal's number, the convention of shells."""

USER_ERRORS = (ValueError, OSError)
"""Exceptions that count as user errors; a missing file or a lacking permission is an `OSError`."""

_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""Texts in gloo's and NCCL's error messages that report the death of another process."""

_PRINTING_SECONDS = 1.0
"""Seconds by which ranks that print nothing delay their exit: `torchrun` stops the printing rank as soon as another
one ends.
"""

_LAUNCHER_SECONDS = 3.0
"""Seconds to wait for `torchrun` to notice that a process has died and to stop the other processes."""

Main = Callable[[], int | None]


class ProcessLost(Exception):
    """Another process of the run has died, so this process stops without printing a traceback."""


def exit_with_error(message: str, code: int = EXIT_USER_ERROR, *, on_every_rank: bool = False) -> NoReturn:
    """Prints `error: message` as one line on the first rank of every host, and exits with `code` on every rank."""
    # Printing on rank 0 alone is not enough, because a file may be missing on one host only.
    line = "error: " + " ".join(message.split())
    prints = on_every_rank or int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0) == 0
    if prints:
        print(line, file=sys.stderr, flush=True)
    tell_launcher(line)
    if not prints and "TORCHELASTIC_ERROR_FILE" in os.environ:
        time.sleep(_PRINTING_SECONDS)
    raise SystemExit(code)


def tell_launcher(text: str) -> None:
    """Writes the reason why this process ends to the file that `torchrun` reads; does nothing without `torchrun`.

    `torchrun` ends with a long report; its last lines show this text for the first process that failed. The file has
    the format of `torch.distributed.elastic.multiprocessing.errors.record`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    more = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": more}}, file)


def describe(error: BaseException) -> str:
    """Returns an exception as text: its message, or `file: reason` for an `OSError` raised by the operating system."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def main_guard(main: Main) -> Main:
    """Wraps an entry point so that errors end it as described at the top of this file."""

    @functools.wraps(main)
    def guarded() -> int | None:
        try:
            return main()
        except BrokenPipeError:
            # The reader has closed our output (`--help | head`). Redirect stdout, or Python's flush at exit fails.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_UNEXPECTED
        except KeyboardInterrupt:
            exit_with_error("interrupted", EXIT_INTERRUPTED)
        except (*USER_ERRORS, ProcessLost) as error:
            if os.environ.get("MEGATRON_EXT_TRACEBACK"):
                tell_launcher(traceback.format_exc())
                raise
            if isinstance(error, ProcessLost):
                exit_with_error(describe(error), EXIT_UNEXPECTED, on_every_rank=True)
            exit_with_error(describe(error))
        except Exception as error:
            if isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_LOST):
                _follow_lost_peer(str(error))
            tell_launcher(traceback.format_exc())
            raise

    return guarded


def _follow_lost_peer(message: str) -> NoReturn:
    """Exits because another process of the run has died; gloo's message contains that process's address."""
    # torchrun reports the first process that exits; wait, so that it reports the process that failed.
    time.sleep(_LAUNCHER_SECONDS)
    rank = os.environ.get("RANK", "0")
    address = re.search(r"\[(?:::ffff:)?([0-9a-f.:]+)\]:\d+", message)
    place = f" on {address[1]}" if address and not address[1].startswith(("127.", "::1")) else ""
    exit_with_error(
        f"rank {rank} stops because another process of the run{place} failed or was killed; "
        "see the output of that process",
        EXIT_UNEXPECTED,
        on_every_rank=True,
    )


def run_main(main: Main) -> NoReturn:
    """Runs an entry point and exits with the code it returns (0 for None).

    Use it as `if __name__ == "__main__": run_main(main)`.
    """
    use_utf8()
    print_any_text()
    raise SystemExit(main_guard(main)() or 0)
