"""Tensors outside of torch's memory, in host memory or on a disk, of which the ranks of a host share one copy.

The memory is a mapped file without a name: nothing finds it but the processes that map it, and the system frees it when
the last of them ends, however it ends. So a run that is killed leaves nothing behind.

The pages of a file on a disk belong to the system's cache. It keeps in memory what it has room for, writes and reads
the rest, and the process needs none of it between two accesses. A process counts the pages that it has touched as
resident until `release_pages` lets go of them.
"""

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import psutil
import torch
import torch.distributed as dist

from megatron_ext.platform.collectives import gather_or_raise, on_every_rank

_RANGES_AT_ONCE = 1024
"""IOV_MAX, the most that Linux takes in one call."""

_on_disk: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


@dataclass(frozen=True)
class MappedTensors:
    """Tensors that all ranks of a group on this host share."""

    tensors: list[torch.Tensor]
    """Filled with zeros; each has its own storage."""

    is_writer: bool
    """Whether this is the host's first rank in the group, which alone should write."""


def mapped_zeros(
    number: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    directory: str | None,
    group: dist.ProcessGroup,
    what: str,
) -> MappedTensors:
    """Makes tensors that a group's ranks on the same host share. Collective over all ranks, each with its own group.

    Args:
        number: how many tensors.
        shape: shape of each.
        dtype: their type.
        directory: where their file is, on a disk; it is made if it does not exist. None keeps them in memory.
        group: the ranks that hold the same values.
        what: the flag that asked for it, for errors.

    Raises:
        OSError: there is no room for them, or the directory is not writable; raised on every rank.
    """
    # Each begins on a page of its own.
    bytes_of_one = prod(shape) * dtype.itemsize
    stride = -(-bytes_of_one // mmap.PAGESIZE) * mmap.PAGESIZE
    size = number * stride
    host = _host()
    hosts = gather_or_raise(lambda: host)
    writer = next(rank for rank in dist.get_process_group_ranks(group) if hosts[rank] == host)
    is_writer = writer == dist.get_rank()
    files: list[IO[bytes]] = []

    def make() -> tuple[int, int] | None:
        if not is_writer:
            return None
        files.append(_new_file(directory, size, what))
        return os.getpid(), files[0].fileno()

    offers = gather_or_raise(make)

    def mapping() -> mmap.mmap:
        if not is_writer:
            process, descriptor = offers[writer] or (0, 0)
            files.append(open(f"/proc/{process}/fd/{descriptor}", "r+b", buffering=0))  # noqa: SIM115
        return mmap.mmap(files[0].fileno(), size)

    mapped = on_every_rank(mapping)  # afterwards nobody needs the writer's descriptor any more
    files[0].close()
    if directory is not None:
        # Rows are far apart; reading ahead of one would read others that nobody wants.
        mapped.madvise(mmap.MADV_RANDOM)
        _on_disk.add(mapped)
    tensors = [
        torch.frombuffer(mapped, dtype=dtype, count=prod(shape), offset=place * stride).view(*shape)
        for place in range(number)
    ]
    return MappedTensors(tensors, is_writer)


def release_pages() -> None:
    """Lets go of all pages of files on a disk that this process has touched; their content is kept."""
    for mapped in _on_disk:
        mapped.madvise(mmap.MADV_DONTNEED)


def read_ahead(table: torch.Tensor, rows: torch.Tensor) -> None:
    """Asks the system to read rows of a mapped tensor [Vp, q] from its disk, all at once; does not wait for them.

    Otherwise each row is read when it is used, and the next one only after it. Does nothing where Linux lacks the call.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "process_madvise"):
        return
    row_bytes = table.stride(0) * table.element_size()
    ends = table.data_ptr() + (rows.numpy() + 1) * row_bytes
    starts = (ends - row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ranges = np.stack([starts, ends - starts], axis=1)
    process = os.pidfd_open(os.getpid())
    try:
        for some in np.split(ranges, range(_RANGES_AT_ONCE, len(ranges), _RANGES_AT_ONCE)):
            libc.process_madvise(
                process, ctypes.c_void_p(some.ctypes.data), ctypes.c_size_t(len(some)), mmap.MADV_WILLNEED, 0
            )
    finally:
        os.close(process)


def _new_file(directory: str | None, size: int, what: str) -> IO[bytes]:
    """Returns a new file of zeros without a name, for all of which there is room."""
    if directory is None:
        free = psutil.virtual_memory().available
        if size > free:
            raise OSError(
                f"{what}: no room for {_mib(size)} in the host's memory, of which {_mib(free)} are free"
            )
        file = open(os.memfd_create("mapped_tensors"), "r+b", buffering=0)  # noqa: SIM115
        os.truncate(file.fileno(), size)
        return file
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115
    except OSError as error:
        raise type(error)(f"{what} {directory}: not writable: {error.strerror}") from None
    try:
        # Reserves it. A write to a mapped page that finds no room on the disk would kill the process.
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{what} {directory}: no room for {_mib(size)} ({error.strerror}); give a directory with more"
        ) from None
    return file


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _host() -> str:
    """Returns what the processes have in common that may open each other's files under /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"process {os.getpid()} of {os.uname().nodename}"
