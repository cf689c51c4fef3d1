"""Where cached activations lie: in memory, or in files that are mapped into memory.

A store maps a key of 16 bytes to a tensor; all tensors of a store have one shape and type. It never fails a run: what
cannot be kept or read back is not there, and the reason is logged once.

On disk every process appends to two files of its own and reads those of all processes in the directory:

    {writer}.data     tensors, one after the other
    {writer}.index    a record of 32 bytes for each: key, place, checksum of the tensor, checksum of the record

A record is written after its tensor, so a process that is killed leaves complete tensors, and perhaps a last record
that is cut off and passed over. A tensor is compared with its checksum whenever it is read.
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
"""Key, place, checksum of the tensor, checksum of what stands before."""


class Store(Protocol):
    """Keeps tensors of one shape by key."""

    size: int
    """Bytes that this process has put into it."""

    def get(self, key: bytes) -> torch.Tensor | None:
        """The tensor of a key, or None."""

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Keeps a tensor while there is room."""


class MemoryStore:
    """In the host's memory."""

    def __init__(self, max_bytes: int) -> None:
        """Args:
        max_bytes: largest size.
        """
        self.size = 0
        self._max_bytes = max_bytes
        self._values: dict[bytes, torch.Tensor] = {}
        self._told = False

    def get(self, key: bytes) -> torch.Tensor | None:
        """The tensor of a key, or None."""
        return self._values.get(key)

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Keeps a copy of a tensor while there is room."""
        if key in self._values:
            return
        if self.size + value.nbytes > self._max_bytes:
            self._told = self._told or _tell_full(self._max_bytes)
            return
        self._values[key] = value.detach().to("cpu", copy=True)
        self.size += value.nbytes


class DiskStore:
    """In files of a directory."""

    def __init__(
        self, directory: Path, writer: str, shape: tuple[int, ...], dtype: torch.dtype, max_bytes: int
    ) -> None:
        """Args:
        directory: is made where it is missing.
        writer: name of this process's files; no other process may have it.
        shape: of every tensor.
        dtype: of every tensor.
        max_bytes: largest size of this process's files.

        Raises:
            ValueError: another process writes these files.
            OSError: the directory cannot be read or made.
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
        # Closes this process's files; so does the end of the object.
        self.close = weakref.finalize(self, _close, self._data, self._index)
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--cache-dir {directory}: another process writes {writer}.data") from None
        self._next = -(-os.fstat(self._data).st_size // self._bytes)
        records = os.fstat(self._index).st_size // _RECORD.size
        os.ftruncate(self._index, records * _RECORD.size)
        self.size = self._next * self._bytes
        self._refresh()

    def get(self, key: bytes) -> torch.Tensor | None:
        """The tensor of a key that any process has written; None too where it is damaged."""
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
                _log.warning("activation cache: %s is damaged; what cannot be read is computed again", path)
            return None
        return torch.frombuffer(content, dtype=self._dtype).view(self._shape)

    def put(self, key: bytes, value: torch.Tensor) -> None:
        """Appends a tensor while there is room."""
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
                "activation cache: %s: %s; no more is kept, what is missing is computed again",
                self._directory,
                error.strerror or error,
            )
            return
        self._next += 1
        self.size += self._bytes
        self._places[key] = self._writer, place, checksum
        self._readers.setdefault(self._writer, _Reader(self._directory, self._writer))

    def _refresh(self) -> None:
        """Takes in what processes have written since the last time."""
        for path in sorted(self._directory.glob("*.index")):
            reader = self._readers.setdefault(path.stem, _Reader(self._directory, path.stem))
            for key, place, checksum in reader.new_records():
                self._places[key] = path.stem, place, checksum


class _Reader:
    """One writer's files, as any process reads them."""

    def __init__(self, directory: Path, writer: str) -> None:
        self._data = directory / f"{writer}.data"
        self._index = directory / f"{writer}.index"
        self._taken = 0
        self._map: mmap.mmap | None = None
        self.told = False

    def new_records(self) -> list[tuple[bytes, int, int]]:
        """Complete records that were not given before; a damaged one is left out."""
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
        """A copy of bytes of the data file, None where it ends before them."""
        try:
            # A file that was cut short would end the process where its map is read.
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
    """Writes all of it, or raises `OSError`."""
    view = memoryview(content).cast("B")
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _tell_full(max_bytes: int) -> bool:
    _log.warning(
        "activation cache: --cache-max-gb %.3g is reached; what does not fit is computed again",
        max_bytes / 2**30,
    )
    return True
