r"""Reads, checks and writes the index file of a Megatron indexed dataset, with numpy alone.

A dataset is two files. `PREFIX.bin` holds the token ids one after the other; `PREFIX.idx` divides them into sequences
and documents:

    offset  size        content (little endian)
    0       9           "MMIDIDX\0\0"
    9       8           version, 1
    17      1           dtype code of the tokens (8: uint16, 4: int32, ...)
    18      8           S, the number of sequences
    26      8           D, the number of document indices (documents + 1)
    34      4 * S       int32 length of each sequence, in tokens
    ..      8 * S       int64 byte offset of each sequence in the .bin
    ..      8 * D       int64 index of each document's first sequence; the last one is S

The layout is that of `megatron.core.datasets.indexed_dataset`; tests compare the two. Files are memory-mapped, or read
and written in chunks, so memory use does not grow with the dataset. The optional mode column of multimodal datasets is
ignored.
"""

import glob
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34
_CHUNK = 1 << 22
DTYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}


@dataclass(frozen=True)
class Index:
    """A memory-mapped index: the sequences and documents of the `.bin` beside it."""

    prefix: str
    """Path of the dataset without `.bin` or `.idx`."""

    dtype: np.dtype
    """Type of one token in the `.bin`."""

    lengths: IntArray
    """int32 [S], number of tokens in each sequence."""

    pointers: IntArray
    """int64 [S], byte offset of each sequence in the `.bin`."""

    document_indices: IntArray
    """int64 [documents + 1], index of each document's first sequence, followed by S."""

    @property
    def num_sequences(self) -> int:
        """S, the number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens: the end of the last sequence, since sequences follow one another without gaps."""
        if self.num_sequences == 0:
            return 0
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def token_chunks(self, size: int) -> Iterator[IntArray]:
        """Yields all tokens in order, `size` at a time. The file is not mapped, so memory use does not grow."""
        with open(bin_path(self.prefix), "rb") as stream:
            for begin, end in chunks(self.num_tokens, size):
                yield np.fromfile(stream, dtype=self.dtype, count=end - begin)

    def release(self) -> None:
        """Frees the memory that the mapped index takes up. Code that reads the whole index calls this at regular
        intervals.
        """
        release(self.lengths)

    def tokens(self) -> IntArray:
        """Memory-maps the whole `.bin` as one array [tokens] of `dtype`, so that a caller can read any part of it."""
        if self.num_tokens == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(bin_path(self.prefix), dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def sequence_start(self, sequence: int) -> int:
        """Returns the token offset at which a sequence starts; for S (one past the last), the number of tokens."""
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def document_starts(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Returns the token offsets at which documents `begin` .. `end - 1` start, int64 [end - begin].

        The range may include `num_documents` (one past the last document), whose offset is the number of tokens.
        """
        return self.sequence_starts(np.asarray(self.document_indices[begin:end]))

    def sequence_starts(self, sequences: IntArray) -> npt.NDArray[np.int64]:
        """Returns the int64 token offsets at which sequences start; for S (one past the last), the number of tokens."""
        starts = np.full(len(sequences), self.num_tokens, dtype=np.int64)
        inside = sequences < self.num_sequences
        starts[inside] = self.pointers[sequences[inside]] // self.dtype.itemsize
        return starts


def bin_path(prefix: str) -> str:
    """Returns the path of a dataset's token file."""
    return f"{prefix}.bin"


def idx_path(prefix: str) -> str:
    """Returns the path of a dataset's index file."""
    return f"{prefix}.idx"


def optimal_dtype(vocab_size: int | None) -> type[np.generic]:
    """Returns the token type that mcore chooses: uint16 for a vocabulary of fewer than 65,500 ids, otherwise int32."""
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


def _hint(prefix: str) -> str:
    """Returns a hint to append to the error message for a prefix that names no dataset; "" if there is none."""
    if prefix.endswith((".bin", ".idx")):
        return "; give the prefix without .bin and .idx"
    # Preprocessing appends `_KEY_document` or `_KEY_sentence` to --output-prefix, so search for such names.
    longer = sorted(glob.glob(f"{glob.escape(prefix)}_*_document.idx"))
    return f"; did you mean {' or '.join(path.removesuffix('.idx') for path in longer)}?" if longer else ""


def open_index(prefix: str) -> Index:
    """Memory-maps `PREFIX.idx` and makes all checks that take constant time.

    Raises:
        FileNotFoundError: the `.idx` or the `.bin` is missing.
        ValueError: the `.idx` is not an index file, or the size of a file contradicts the header (a truncated file).
    """
    idx, binary = idx_path(prefix), bin_path(prefix)
    for path in (idx, binary):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"data file not found: {path}{_hint(prefix)}")
    dtype, sequences, documents = _read_header(idx)
    expected = _HEADER_BYTES + 12 * sequences + 8 * documents
    actual = os.path.getsize(idx)
    if actual not in (expected, expected + sequences):  # multimodal datasets append one byte per sequence
        raise ValueError(
            f"{idx} is {actual} bytes, but its header describes {expected} bytes; it is truncated or corrupt"
        )
    index = _map_arrays(prefix, dtype, sequences, documents)
    if documents < 1 or int(index.document_indices[-1]) != sequences:
        raise ValueError(
            f"{idx} is corrupt: its last document does not end with the last of its {sequences} sequences"
        )
    size, wanted = os.path.getsize(binary), index.num_tokens * dtype.itemsize
    if size != wanted:
        raise ValueError(
            f"{binary} is {size} bytes, but {idx} describes {wanted} bytes; it is truncated or corrupt"
        )
    return index


def _read_header(path: str) -> tuple[np.dtype, int, int]:
    """Reads (dtype, number of sequences, number of document indices) from an index file."""
    with open(path, "rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
        raise ValueError(f"{path} is not an indexed dataset's index file")
    version, code, sequences, documents = struct.unpack("<QBQQ", header[9:])
    if version != 1 or code not in DTYPE_CODES:
        raise ValueError(f"{path}: unknown index version {version} or token type code {code}")
    return np.dtype(DTYPE_CODES[code]), sequences, documents


def _map_arrays(prefix: str, dtype: np.dtype, sequences: int, documents: int) -> Index:
    """Memory-maps the three columns of an index file, given the numbers in its header."""
    raw = np.memmap(idx_path(prefix), dtype=np.uint8, mode="r")
    a = _HEADER_BYTES
    b, c = a + 4 * sequences, a + 12 * sequences
    return Index(
        prefix=prefix,
        dtype=dtype,
        lengths=raw[a:b].view(np.int32),
        pointers=raw[b:c].view(np.int64),
        document_indices=raw[c : c + 8 * documents].view(np.int64),
    )


def check_contiguous(index: Index) -> None:
    """Checks every pointer and document index in one pass over the index file; memory use does not grow with its size.

    Raises:
        ValueError: a length is negative, a sequence does not start where the one before it ended, or the
            document indices decrease.
    """
    expected = 0
    for begin, end in chunks(index.num_sequences):
        lengths = index.lengths[begin:end].astype(np.int64)
        ends = expected + np.cumsum(lengths) * index.dtype.itemsize
        wrong = (lengths < 0) | (index.pointers[begin:end] != ends - lengths * index.dtype.itemsize)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise ValueError(
                f"{idx_path(index.prefix)}: sequence {begin + at} has length {lengths[at]} and pointer "
                f"{index.pointers[begin + at]}: its length is negative, or it does not start where the sequence "
                "before it ends"
            )
        expected = int(ends[-1])
        index.release()
    previous = 0
    for begin, end in chunks(len(index.document_indices)):
        part = index.document_indices[begin:end]
        steps = np.diff(part, prepend=previous)
        if (steps < 0).any() or (begin == 0 and part[0] != 0):
            raise ValueError(f"{idx_path(index.prefix)}: document indices must start at 0 and never decrease")
        previous = int(part[-1])
        index.release()


def release(array: IntArray) -> None:
    """Frees the memory that a memory-mapped array takes up in this process; the array can still be read.

    Without this, a large file that has been read would count as this process's memory. Does nothing for other arrays.
    """
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def chunks(total: int, size: int = _CHUNK) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) pairs that divide `range(total)` into pieces of at most `size` numbers."""
    for begin in range(0, total, size):
        yield begin, min(begin + size, total)


def write_index(
    path: str | Path, dtype: npt.DTypeLike, lengths: IntArray, document_indices: IntArray
) -> None:
    """Writes an index file, byte for byte as mcore's `IndexedDatasetBuilder` does, and flushes it to disk.

    Args:
        path: the file to write; callers pass a temporary path and rename the file (see `manifest.write_atomically`).
        dtype: type of one token.
        lengths: [S] number of tokens in each sequence, of any integer type; may be memory-mapped.
        document_indices: [documents + 1] index of each document's first sequence, followed by S.
    """
    token = np.dtype(dtype)
    code = next(code for code, known in DTYPE_CODES.items() if np.dtype(known) == token)
    with open(path, "wb") as stream:
        stream.write(_MAGIC + struct.pack("<QBQQ", 1, code, len(lengths), len(document_indices)))
        _write_column(stream, lengths, "<i4")
        pointer = 0
        for begin, end in chunks(len(lengths)):
            sizes = lengths[begin:end].astype(np.int64) * token.itemsize
            ends = pointer + np.cumsum(sizes)
            stream.write((ends - sizes).astype("<i8").tobytes())
            pointer = int(ends[-1])
            release(lengths)
        _write_column(stream, document_indices, "<i8")
        stream.flush()
        os.fsync(stream.fileno())


def _write_column(stream: BinaryIO, values: IntArray, dtype: str) -> None:
    """Converts and writes one column of the index, in chunks."""
    for begin, end in chunks(len(values)):
        stream.write(values[begin:end].astype(dtype).tobytes())
        release(values)


def map_column(path: Path, dtype: npt.DTypeLike) -> IntArray:
    """Memory-maps a file of numbers; an empty file, which cannot be mapped, gives an empty array."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
