"""Stores of cached activations: in memory, or in memory-mapped files.

A store maps a key of 16 bytes to a tensor; all tensors of a store have the same shape and dtype. Storage errors never
end a run: a tensor that cannot be stored or read counts as missing, and the reason is logged once.

On disk, every process appends to two files of its own, whose name `writer` is unique, and reads the files of all
processes in the directory:

    {writer}.data     the tensors, one after the other
    {writer}.index    32 bytes per tensor: key, index in the data file, checksum of the tensor, checksum of the record

Each 32 bytes are a record, which is written after its tensor. Therefore, even if a process is killed, every complete
record belongs to a complete tensor; an incomplete last record is skipped. Every read compares the tensor with its
checksum.
"""

import fcntl
import logging
import mmap
import os
import struct
import weakref
import zlib
from pathlib import Path
from typing import Protocol

import torch

_log = logging.getLogger(__name__)

_RECORD = struct.Struct("<16sQII")
"""The fields of a record: key, index of the tensor, checksum of the tensor, checksum of these three fields."""


class Store(Protocol):
    """Stores tensors of one shape by key."""

    size: int
    """Size of the tensors that this process has stored, in bytes."""

    def get(self, key: bytes) -> torch.Tensor | None:
        """Returns the tensor stored under a key; None if the key is missing."""

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Stores a tensor under a key, unless the size limit would be exceeded."""


class MemoryStore:
    """A store in host memory."""

    def __init__(self, max_bytes: int) -> None:
        """Args:
        max_bytes: size limit in bytes.
        """
        self.size = 0
        self._max_bytes = max_bytes
        self._values: dict[bytes, torch.Tensor] = {}
        self._told = False

    def get(self, key: bytes) -> torch.Tensor | None:
        """Returns the tensor stored under a key; None if the key is missing."""
        return self._values.get(key)

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Stores a copy of a tensor under a key, unless the size limit would be exceeded."""
        if key in self._values:
            return
        if self.size + value.nbytes > self._max_bytes:
            self._told = self._told or _tell_full(self._max_bytes)
            return
        self._values[key] = value.detach().to("cpu", copy=True)
        self.size += value.nbytes


class DiskStore:
    """A store in the files of a directory."""

    def __init__(
        self, directory: Path, writer: str, shape: tuple[int, ...], dtype: torch.dtype, max_bytes: int
    ) -> None:
        """Args:
        directory: the directory of the files; created if it does not exist.
        writer: name of this process's files; different for every process.
        shape: shape of every tensor.
        dtype: dtype of every tensor.
        max_bytes: size limit of this process's files.

        Raises:
            ValueError: another process is writing these files.
            OSError: the directory cannot be read or created.
        """
        self._directory, self._writer = directory, writer
        self._shape, self._dtype, self._max_bytes = shape, dtype, max_bytes
        self._bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        self._readers: dict[str, _Reader] = {}
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._full = False
        directory.mkdir(parents=True, exist_ok=True)
        self._data = os.open(directory / f"{writer}.data", os.O_RDWR | os.O_CREAT, 0o644)
        self._index = os.open(directory / f"{writer}.index", os.O_RDWR | os.O_CREAT, 0o644)
        # `close` closes this process's files when it is called, or when the store is garbage-collected.
        self.close = weakref.finalize(self, _close, self._data, self._index)
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--cache-dir {directory}: another process is writing {writer}.data; pass another directory"
            ) from None
        self._next = -(-os.fstat(self._data).st_size // self._bytes)
        records = os.fstat(self._index).st_size // _RECORD.size
        os.ftruncate(self._index, records * _RECORD.size)
        self.size = self._next * self._bytes
        self._refresh()

    def get(self, key: bytes) -> torch.Tensor | None:
        """Returns the tensor that any process has stored under a key; None if it is missing or damaged."""
        if key not in self._places:
            self._refresh()
        if key not in self._places:
            return None
        writer, place, checksum = self._places[key]
        content = self._readers[writer].read(place * self._bytes, self._bytes)
        if content is None or zlib.crc32(content) != checksum:
            del self._places[key]
            if not self._readers[writer].told:
                self._readers[writer].told = True
                path = self._directory / f"{writer}.data"
                _log.warning(
                    "activation cache: %s is damaged; entries that cannot be read are computed again", path
                )
            return None
        return torch.frombuffer(content, dtype=self._dtype).view(self._shape)

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Appends a tensor to this process's files, unless the size limit would be exceeded."""
        if self._full or key in self._places:
            return
        if self.size + self._bytes > self._max_bytes:
            self._full = _tell_full(self._max_bytes)
            return
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        place, checksum = self._next, zlib.crc32(content)
        record = struct.pack("<16sQI", key, place, checksum)
        try:
            _write(self._data, content, place * self._bytes)
            _write(self._index, record + struct.pack("<I", zlib.crc32(record)), os.fstat(self._index).st_size)
        except OSError as error:
            self._full = True
            _log.warning(
                "activation cache: cannot write to %s (%s); no further entries are stored",
                self._directory,
                error.strerror or error,
            )
            return
        self._next += 1
        self.size += self._bytes
        self._places[key] = self._writer, place, checksum
        self._readers.setdefault(self._writer, _Reader(self._directory, self._writer))

    def _refresh(self) -> None:
        """Reads the records that all processes have written since the last call."""
        for path in sorted(self._directory.glob("*.index")):
            reader = self._readers.setdefault(path.stem, _Reader(self._directory, path.stem))
            for key, place, checksum in reader.new_records():
                self._places[key] = path.stem, place, checksum


class _Reader:
    """Reads the two files of one process."""

    def __init__(self, directory: Path, writer: str) -> None:
        self._data = directory / f"{writer}.data"
        self._index = directory / f"{writer}.index"
        self._taken = 0
        self._map: mmap.mmap | None = None
        self.told = False

    def new_records(self) -> list[tuple[bytes, int, int]]:
        """Returns the complete, undamaged records that were added since the last call."""
        if os.stat(self._index).st_size < self._taken + _RECORD.size:
            return []
        with open(self._index, "rb") as stream:
            stream.seek(self._taken)
            content = stream.read()
        count = len(content) // _RECORD.size
        self._taken += count * _RECORD.size
        found = []
        for number in range(count):
            record = content[number * _RECORD.size : (number + 1) * _RECORD.size]
            key, place, checksum, own = _RECORD.unpack(record)
            if zlib.crc32(record[:-4]) == own:
                found.append((key, place, checksum))
        return found

    def read(self, start: int, size: int) -> bytearray | None:
        """Returns a copy of a range of the data file, or None if the file is too short."""
        try:
            # Reading a memory map beyond the end of a truncated file would kill the process (SIGBUS).
            if os.stat(self._data).st_size < start + size:
                return None
            if self._map is None or len(self._map) < start + size:
                with open(self._data, "rb") as stream:
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            return None
        return bytearray(self._map[start : start + size])


def _close(*files: int) -> None:
    for file in files:
        os.close(file)


def _write(file: int, content: bytes | memoryview, offset: int) -> None:
    """Writes the whole content at an offset; raises `OSError` if this fails."""
    view = memoryview(content).cast("B")
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _tell_full(max_bytes: int) -> bool:
    _log.warning(
        "activation cache: --cache-max-gb %.3g is reached; for samples that do not fit, the trunk runs "
        "in every epoch",
        max_bytes / 2**30,
    )
    return True
