"""A lock that lets only one run at a time write to a directory of checkpoints.

After `kill -9` of torchrun, its workers still finish their step and save. They would write into the directory of the
run that was started to replace them. Rank 0 therefore holds a lock on a file in the directory while the run lasts.

The lock is a POSIX record lock. The operating system releases it when the process ends for any reason. Forked data
workers do not hold it, and a process does not lock itself out. Other hosts see the lock if the file system supports
that (NFS does). On a file system without locks the run continues without one. The file names the process that holds the
lock, and is removed when the run ends; a file left by a killed run is not locked and has no effect.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_ext.platform.collectives import on_first_rank

LOCK_FILE = ".run_lock"

_TAKEN = {errno.EACCES, errno.EAGAIN}
_UNKNOWN = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextlib.contextmanager
def run_lock(save: str | None) -> Iterator[None]:
    """Context manager that keeps other runs from writing to a directory. Collective on entry.

    Args:
        save: the directory, created if it is missing (rank 0's value is used); None if the run does not save.

    Raises:
        ValueError: another run holds the lock; raised on every rank.
    """
    held: list[TextIO] = []
    made = save is not None and not Path(save).exists()
    if save is not None:
        on_first_rank(lambda: held.extend(take_lock(Path(save))))
    try:
        yield
    finally:
        for file in held:
            release_lock(file)
        if held and made:  # a refused run must not leave an empty directory
            with contextlib.suppress(OSError):
                Path(str(save)).rmdir()


def take_lock(directory: Path) -> list[TextIO]:
    """Locks a directory for this process.

    Returns:
        The open lock file in a list, to pass to `release_lock`; an empty list if the file system has no locks.

    Raises:
        ValueError: another process holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_FILE
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read() or "which is starting"
            file.close()
            if error.errno in _TAKEN:
                raise ValueError(
                    f"--save {directory}: another run is writing to it ({holder}); wait until that run has ended, or "
                    "pass another --save"
                ) from None
            if error.errno not in _UNKNOWN:
                raise
            path.unlink(missing_ok=True)
            return []
        if _is_at(path, file):
            break
        file.close()  # the previous holder has meanwhile removed this file, so lock the new one
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return [file]


def release_lock(file: TextIO) -> None:
    """Removes the lock file while it is still locked, then releases the lock."""
    with contextlib.suppress(OSError):
        path = Path(file.name)
        if _is_at(path, file):
            path.unlink()
    file.close()


def _is_at(path: Path, file: TextIO) -> bool:
    """Returns whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
