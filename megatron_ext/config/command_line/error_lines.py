"""How an entry point ends: what a user can change is one `error: ...` line, anything else keeps its traceback.

    a user's mistake            one line on the first rank of a host, exit code 2 on every rank
    a process of the run died   one line, exit code 1
    Ctrl-C, before a run listens for it     one line, exit code 130
    anything else               a defect: its traceback, exit code 1

`MEGATRON_EXT_TRACEBACK=1` shows the traceback of the first two as well.

`torchrun` ends with a long report of its own. It shows last what the first process to fail has left in a file, which is
therefore written here: the line, or the traceback, stands at the end of all that the user sees.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from megatron_ext.config.command_line.flag_text import print_any_text, use_utf8

EXIT_UNEXPECTED = 1
"""Exit code after what is not the user's doing."""

EXIT_USER_ERROR = 2
"""Exit code after a user's mistake."""

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, the shell's own."""

USER_ERRORS = (ValueError, OSError)
"""What the library raises for a user's mistake; missing files and permissions are kinds of `OSError`."""

_PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say in a process whose partner in a collective has died."""

_LAUNCHER_SECONDS = 2.0
"""Longer than `torchrun` takes to see that a process has died, and to end the others."""

Main = Callable[[], int | None]


class ProcessLost(Exception):
    """A process that the run needs has died: no flag is wrong, and this process's traceback would tell nothing."""


def exit_with_error(message: str, code: int = EXIT_USER_ERROR, *, on_every_rank: bool = False) -> NoReturn:
    """Prints `error: message` as one line on the first rank of every host and leaves with the code on every rank.

    Every host speaks, because a file may be missing on one of them alone.
    """
    line = "error: " + " ".join(message.split())
    if on_every_rank or int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0) == 0:
        print(line, file=sys.stderr, flush=True)
    tell_launcher(line)
    raise SystemExit(code)


def tell_launcher(text: str) -> None:
    """Leaves why this process ends, for the report of `torchrun`; nothing happens where there is no launcher.

    The file's form is that of `torch.distributed.elastic.multiprocessing.errors.record`; the first text counts.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    more = {"py_callstack": text, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": text, "extraInfo": more}}, file)


def describe(error: BaseException) -> str:
    """Returns a user's mistake in words: the message; of the system's `OSError` the reason, after the file if known."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def main_guard(main: Main) -> Main:
    """Wraps an entry point so that it ends as told above."""

    @functools.wraps(main)
    def guarded() -> int | None:
        try:
            return main()
        except BrokenPipeError:
            # Whoever read our output has left (`--help | head`); nothing of it is a mistake.
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
                _follow_lost_peer()
            tell_launcher(traceback.format_exc())
            raise

    return guarded


def _follow_lost_peer() -> NoReturn:
    """Leaves because another process has left, which has told why, and must stay the first to fail for the launcher."""
    time.sleep(_LAUNCHER_SECONDS)
    rank = os.environ.get("RANK", "0")
    exit_with_error(
        f"rank {rank} has lost another process of the run; the error is that process's, or the system has killed it",
        EXIT_UNEXPECTED,
        on_every_rank=True,
    )


def run_main(main: Main) -> NoReturn:
    """Runs an entry point and exits with its code (None is 0); use as `if __name__ == "__main__": run_main(main)`."""
    use_utf8()
    print_any_text()
    raise SystemExit(main_guard(main)() or 0)
