"""Stores of the activation cache: what is kept is read back, what is damaged or does not fit is not there."""

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.progressive.cache import activation_store as cache_store
from megatron_ext.progressive.cache.activation_store import DiskStore, MemoryStore

SHAPE, BYTES = (4, 3), 48
KEYS = [bytes([number] * 16) for number in range(6)]
VALUES = [torch.full(SHAPE, float(number)) for number in range(6)]


def _store(folder: Path, writer: str = "rank0", tensors: int = 100) -> DiskStore:
    return DiskStore(folder, writer, SHAPE, torch.float32, tensors * BYTES)


def _fill(folder: Path, count: int = 3) -> None:
    store = _store(folder)
    for key, value in zip(KEYS[:count], VALUES, strict=False):
        store.put(key, value)
    store.close()


def _found(store: Any, count: int = 3) -> list[bool]:
    """Whether each tensor is there, with the right values."""
    values = [store.get(key) for key in KEYS[:count]]
    for value, expected in zip(values, VALUES, strict=False):
        assert value is None or torch.equal(value, expected)
    return [value is not None for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_read_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(SHAPE).to(dtype)
    disk = DiskStore(tmp_path, "rank0", SHAPE, dtype, 1000)
    for store in (MemoryStore(1000), disk):
        store.put(KEYS[0], value)
        found = store.get(KEYS[0])
        assert found is not None and found.dtype == dtype and torch.equal(found, value)
        assert store.get(KEYS[1]) is None
        assert store.size == value.nbytes


def test_files_are_found_by_a_later_run_and_by_other_processes(tmp_path: Path) -> None:
    _fill(tmp_path, 2)
    own, other = _store(tmp_path), _store(tmp_path, "rank1")
    assert _found(own) == _found(other) == [True, True, False]
    own.put(KEYS[2], VALUES[2])
    assert _found(other) == [True] * 3
    assert own.size == 3 * BYTES


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    store = _store(tmp_path)
    with pytest.raises(ValueError, match="--cache-dir .* another process is writing rank0"):
        _store(tmp_path)
    store.close()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_does_not_fit_is_left_out_and_told_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore(2 * BYTES) if kind == "memory" else _store(tmp_path, tensors=2)
    with caplog.at_level(logging.WARNING):
        for key, value in zip(KEYS, VALUES, strict=True):
            store.put(key, value)
    assert _found(store, 6) == [True] * 2 + [False] * 4
    assert len(caplog.records) == 1 and "--cache-max-gb" in caplog.text


def _flip(folder: Path) -> None:
    content = bytearray((folder / "rank0.data").read_bytes())
    content[BYTES + 5] ^= 1
    (folder / "rank0.data").write_bytes(content)


def _cut(folder: Path) -> None:
    os.truncate(folder / "rank0.data", BYTES + 7)


def _remove(folder: Path) -> None:
    (folder / "rank0.data").unlink()


@pytest.mark.parametrize(
    ("damage", "left"),
    [(_flip, [True, False, True]), (_cut, [True, False, False]), (_remove, [False, False, False])],
)
@pytest.mark.parametrize("while_open", [True, False])
def test_damaged_data_is_not_there_is_told_once_and_made_again(
    while_open: bool, damage: Any, left: list[bool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _fill(tmp_path)
    reader = _store(tmp_path, "rank1") if while_open else None
    damage(tmp_path)
    reader = reader or _store(tmp_path, "rank1")
    with caplog.at_level(logging.WARNING):
        assert _found(reader) == left
    assert len(caplog.records) == 1 and "rank0.data is damaged" in caplog.text
    for key, value in zip(KEYS[:3], VALUES, strict=False):
        reader.put(key, value)
    assert _found(reader) == [True] * 3


def test_an_index_that_is_cut_off_or_damaged_loses_that_record_only(tmp_path: Path) -> None:
    _fill(tmp_path)
    index = tmp_path / "rank0.index"
    content = bytearray(index.read_bytes())
    content[3] ^= 1
    index.write_bytes(content[:-5])
    store = _store(tmp_path)
    assert _found(store) == [False, True, False]
    for key, value in zip(KEYS, VALUES, strict=True):
        store.put(key, value)
    store.close()
    assert _found(_store(tmp_path), 6) == [True] * 6


def test_a_full_disk_ends_the_writing_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = _store(tmp_path)
    store.put(KEYS[0], VALUES[0])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_store.os, "pwrite", full)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        store.put(KEYS[1], VALUES[1])
        store.put(KEYS[2], VALUES[2])
    assert _found(store) == [True, False, False]
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text
