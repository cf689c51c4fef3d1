"""One run at a time writes to a directory of checkpoints.

A run may still be there, unseen: after `kill -9` of torchrun its workers finish their step and save, and would do so
beside the run that is started in their place. So rank 0 holds a lock on a file in the directory while the run lasts.

It is a POSIX record lock: the operating system ends it with the process, however that ends; data workers forked from it
do not hold it; a process does not lock itself out; other hosts see it where the file system passes locks on (NFS does).
A file system that has no locks is used without. The file says who holds it, and is removed at the end; one that a
killed run has left is not locked, and means nothing.
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
    """Within it no other run writes to a directory. Collective on entry.

    Args:
        save: the directory, rank 0's counts; made if it is not there. None where the run writes to none.

    Raises:
        ValueError: another run holds it; on every rank.
    """
    held: list[TextIO] = []
    if save is not None:
        on_first_rank(lambda: held.extend(take_lock(Path(save))))
    try:
        yield
    finally:
        for file in held:
            release_lock(file)


def take_lock(directory: Path) -> list[TextIO]:
    """Locks a directory in this process: one open file, for `release_lock`; none where the file system has no locks.

    Raises:
        ValueError: another process holds it.
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
                raise ValueError(f"--save {directory}: another run is writing to it ({holder})") from None
            if error.errno not in _UNKNOWN:
                raise
            path.unlink(missing_ok=True)
            return []
        if _is_at(path, file):
            break
        file.close()  # its holder has removed it in between; another one may be there
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return [file]


def release_lock(file: TextIO) -> None:
    """Removes the file, while it is still locked, and ends the lock."""
    with contextlib.suppress(OSError):
        path = Path(file.name)
        if _is_at(path, file):
            path.unlink()
    file.close()


def _is_at(path: Path, file: TextIO) -> bool:
    """True where the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
