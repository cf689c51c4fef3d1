"""Tensors in mapped memory (host memory, or a file on a disk), of which the ranks of a host share one copy.

The memory is a mapped file without a name: only the processes that map it can find it, and the system frees it when
the last of these processes ends, for any reason. So even a killed run leaves nothing behind.

The pages of a file on a disk belong to the system's cache. The cache keeps as many pages in memory as fit, and writes
and reads the others; the process itself needs no page between two accesses. The pages that a process has touched
count as its resident memory until `release_pages` releases them.
"""

import ctypes
import errno
import mmap
import os
import shutil
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
"""IOV_MAX, the largest number of ranges that Linux accepts in one call."""

_on_disk: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


@dataclass(frozen=True)
class MappedTensors:
    """Tensors that all ranks of a group on this host share."""

    tensors: list[torch.Tensor]
    """The tensors, filled with zeros; each has its own storage."""

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
    need: str,
) -> MappedTensors:
    """Makes tensors that a group's ranks on the same host share. Collective: every rank must call it, with its own
    group.

    Args:
        number: number of tensors.
        shape: shape of each tensor.
        dtype: dtype of the tensors.
        directory: directory of the file, on a disk; created if it does not exist. None keeps the tensors in memory.
        group: the ranks that hold the same values.
        what: the flag that requires the tensors, for error messages.
        need: the space that the caller needs in all, in words, for error messages.

    Raises:
        OSError: there is not enough space, or the directory is not writable; raised on every rank.
    """
    # Each tensor starts on a new page.
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
        files.append(_new_file(directory, size, what, need))
        return os.getpid(), files[0].fileno()

    offers = gather_or_raise(make)

    def mapping() -> mmap.mmap:
        if not is_writer:
            process, descriptor = offers[writer] or (0, 0)
            files.append(open(f"/proc/{process}/fd/{descriptor}", "r+b", buffering=0))  # noqa: SIM115
        return mmap.mmap(files[0].fileno(), size)

    mapped = on_every_rank(mapping)  # afterwards no rank needs the writer's descriptor
    files[0].close()
    if directory is not None:
        # The rows of a step are far apart; reading ahead would read rows that are not needed.
        mapped.madvise(mmap.MADV_RANDOM)
        _on_disk.add(mapped)
    tensors = [
        torch.frombuffer(mapped, dtype=dtype, count=prod(shape), offset=place * stride).view(*shape)
        for place in range(number)
    ]
    return MappedTensors(tensors, is_writer)


def release_pages() -> None:
    """Releases all pages of files on a disk that this process has touched; their content is kept."""
    for mapped in _on_disk:
        mapped.madvise(mmap.MADV_DONTNEED)


def read_ahead(table: torch.Tensor, rows: torch.Tensor) -> None:
    """Starts to read the given rows of a mapped tensor [Vp, q] from the disk, without waiting for them.

    Otherwise each row would be read only when it is used, one after the other. Does nothing if the C library does not
    have `process_madvise`.
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


def _new_file(directory: str | None, size: int, what: str, need: str) -> IO[bytes]:
    """Returns a new file of zeros without a name, whose whole space is reserved."""
    if directory is None:
        free = psutil.virtual_memory().available
        if size > free:
            raise OSError(
                f"{what}: no room for {_mib(size)} in the host's memory, of which {_mib(free)} are free; {need}"
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
        # This reserves the space. Otherwise, a write to a mapped page on a full disk would kill the process.
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(directory).free
        raise OSError(
            f"{what} {directory}: no room for {_mib(size)} ({error.strerror}), {_mib(free)} are free; {need}"
        ) from None
    return file


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _host() -> str:
    """Returns a value that is equal on all processes that can open each other's files under /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"process {os.getpid()} of {os.uname().nodename}"
