"""Mapped tensors: what they keep resident, how rows come from a disk, and that no file is left or found."""

import mmap
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.platform.memory import mapped_tensors
from megatron_ext.platform.memory.mapped_tensors import mapped_zeros, read_ahead, release_pages
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

SHAPE = (65536, 64)
MIB = 16  # of one tensor in fp32


def _make(directory: str | None, number: int = 2) -> list[torch.Tensor]:
    initialize(ParallelConfig(), seed=1)
    assert dist.group.WORLD is not None
    return mapped_zeros(
        number, SHAPE, torch.float32, directory=directory, group=dist.group.WORLD, what="--flag", need="all"
    ).tensors


def _resident(kind: str) -> int:
    """MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith(kind)]
    return int(line.split()[1]) // 1024


def _released(directory: str) -> tuple[list[int], bool, list[str]]:
    first, second = _make(directory)
    sizes = [_resident("VmRSS")]
    second.copy_(torch.arange(second.numel()).view(SHAPE) % 1000)
    sizes.append(_resident("VmRSS"))
    release_pages()
    sizes.append(_resident("VmRSS"))
    kept = torch.equal(second, torch.arange(second.numel()).view(SHAPE) % 1000) and not first.any()
    return sizes, bool(kept), os.listdir(directory)


def test_released_pages_are_not_resident_keep_their_content_and_have_no_file_with_a_name(
    tmp_path: Path,
) -> None:
    (before, touched, after), kept, names = run_single(_released, str(tmp_path / "new"))
    assert touched - before >= MIB - 1
    assert touched - after >= MIB - 1
    assert kept
    assert names == []


def _apart() -> list[int]:
    tensors = _make(None)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    return [tensor.data_ptr() % mmap.PAGESIZE for tensor in tensors]


def test_each_tensor_has_its_own_storage_on_its_own_pages() -> None:
    assert run_single(_apart) == [0, 0]


def _refusal(directory: str | None, number: int) -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011
        _make(directory, number)
    return str(caught.value)


def test_more_than_there_is_room_for_is_refused_on_a_disk_and_in_memory(tmp_path: Path) -> None:
    number = 10**7  # 160 TB
    error = run_single(_refusal, str(tmp_path), number)
    assert error.startswith(f"--flag {tmp_path}: no room for 160,000,000 MiB (")
    assert run_single(_refusal, None, number).startswith(
        "--flag: no room for 160,000,000 MiB in the host's memory"
    )
    assert os.listdir(tmp_path) == []


def _page_faults(reads: Callable[[list[torch.Tensor], torch.Tensor], None]) -> tuple[int, bool]:
    """Waits for a disk while rows are looked up that the cache of files lacks; and whether they are right."""
    new_file, kept = mapped_tensors._new_file, []

    def spied(directory: str | None, size: int, what: str, need: str) -> IO[bytes]:
        file = new_file(directory, size, what, need)
        kept.append(os.dup(file.fileno()))
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_tensors, "_new_file", spied)
        tensors = _make(tempfile.gettempdir())
    for tensor in tensors:
        tensor.copy_(torch.arange(SHAPE[0]).unsqueeze(1).expand(SHAPE))
    release_pages()
    os.fsync(kept[0])
    os.posix_fadvise(kept[0], 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(kept[0])
    rows = torch.randint(0, SHAPE[0], (300,), generator=torch.Generator().manual_seed(1)).sort().values
    reads(tensors, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    found = [tensor[rows] for tensor in tensors]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    return after - before, all(bool((part == rows.unsqueeze(1)).all()) for part in found)


def _ahead(tensors: list[torch.Tensor], rows: torch.Tensor) -> None:
    for tensor in tensors:
        read_ahead(tensor, rows)


def _nothing(tensors: list[torch.Tensor], rows: torch.Tensor) -> None:
    pass


def test_rows_that_are_asked_for_are_read_from_the_disk_together() -> None:
    (alone, right), (ahead, right_ahead) = (run_single(_page_faults, reads) for reads in (_nothing, _ahead))
    assert right and right_ahead
    if alone < 300:
        pytest.skip(f"{tempfile.gettempdir()} is in memory")
    assert ahead < alone / 4
