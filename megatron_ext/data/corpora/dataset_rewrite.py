"""Makes new datasets from old ones: merges several, splits one, or shuffles the documents of one.

Every function here moves whole documents (also empty ones and those of several sequences), reads piece by piece, and
renames the finished files at the end, the index last. The place of a document in the output depends only on the
number of documents and the seed, so a main dataset and its per-layer data stay aligned if both go through the same
command.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed.indexed_files import (
    Index,
    IntArray,
    bin_path,
    chunks,
    idx_path,
    map_column,
    open_index,
    write_index,
)
from megatron_ext.data.indexed.manifest import (
    PREPENDED_BOS,
    manifest_path,
    read_manifest,
    write_atomically,
    write_manifest,
)
from megatron_ext.data.indexed.same_file import refuse_same_dataset

_CHUNK_DOCUMENTS = 1 << 15
_READ_BYTES = 1 << 23
_ROUNDS = 6


class DatasetWriter:
    """Writes a dataset of unknown size with bounded memory; both files appear at the end of the `with` block.

    Temporary files hold the columns of the index until their lengths are known. After an error, the temporary files are
    removed.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self._sequences = 0

    def __enter__(self) -> "DatasetWriter":
        self._stack = contextlib.ExitStack()
        self._idx = self._stack.enter_context(write_atomically(idx_path(self.prefix)))
        self._bin = self._stack.enter_context(write_atomically(bin_path(self.prefix)))
        self._columns = [self._bin.with_suffix(f".{name}.tmp") for name in ("lengths", "documents")]
        self._tokens = self._bin.open("wb")
        self._lengths, self._documents = (path.open("wb") for path in self._columns)
        self._documents.write(np.zeros(1, dtype=np.int64).tobytes())
        return self

    def add(self, tokens: Iterable[bytes], lengths: IntArray, document_ends: IntArray) -> None:
        """Appends documents.

        Args:
            tokens: the tokens of all these documents as bytes, in pieces.
            lengths: number of tokens in each sequence of these documents.
            document_ends: [documents] number of sequences up to the end of each document, counted within this call.
        """
        self._tokens.writelines(tokens)
        self._lengths.write(lengths.astype(np.int32).tobytes())
        self._documents.write((document_ends + self._sequences).astype(np.int64).tobytes())
        self._sequences += len(lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._tokens.flush()
                os.fsync(self._tokens.fileno())
            for stream in (self._tokens, self._lengths, self._documents):
                stream.close()
            if error is None:
                lengths, documents = map(map_column, self._columns, (np.int32, np.int64))
                write_index(self._idx, self.dtype, lengths, documents)
                for stale in (idx_path(self.prefix), manifest_path(self.prefix)):
                    Path(stale).unlink(missing_ok=True)
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        finally:
            for path in self._columns:
                path.unlink(missing_ok=True)
        self._stack.__exit__(kind, error, trace)


def merge(prefixes: Sequence[str], output: str) -> None:
    """Concatenates datasets in the order given.

    Raises:
        ValueError: token types, tokenizers or per-layer strategies differ, or an input is given twice or is the output.
    """
    indices = [open_index(prefix) for prefix in prefixes]
    refuse_same_dataset("merge", prefixes)
    dtypes = {index.dtype for index in indices}
    if len(dtypes) != 1:
        names = ", ".join(f"{index.prefix} is {index.dtype.name}" for index in indices)
        raise ValueError(f"cannot merge datasets of different token types: {names}")
    described = _described(prefixes)
    _refuse_overwriting(prefixes, [output])
    with DatasetWriter(output, dtypes.pop()) as writer:
        for index in indices:
            _copy(index, writer, 0, index.num_documents)
    _finish(output, "data merge", prefixes, described)


def split(prefix: str, outputs: Sequence[str], shares: Sequence[float]) -> None:
    """Cuts a dataset into consecutive parts of whole documents.

    Args:
        prefix: prefix of the dataset.
        outputs: prefix of each part.
        shares: each part's share of the documents; they need not add up to 1.

    Raises:
        ValueError: the shares do not match the outputs, a share is not positive, or a part would have no document.
    """
    if len(outputs) != len(shares) or not outputs:
        raise ValueError(
            f"--shares has {len(shares)} values, but --output-prefix has {len(outputs)}; give one for each part"
        )
    if min(shares) <= 0:
        raise ValueError(f"--shares {' '.join(map(str, shares))} must all be positive")
    if len(set(outputs)) != len(outputs):
        raise ValueError(
            f"--output-prefix {' '.join(outputs)}: a prefix is given twice; each part needs its own"
        )
    _refuse_overwriting([prefix], outputs)
    index = open_index(prefix)
    bounds = [round(end * index.num_documents) for end in np.cumsum([0.0, *shares]) / sum(shares)]
    for output, begin, end in zip(outputs, bounds[:-1], bounds[1:], strict=True):
        if begin == end:
            raise ValueError(
                f"--shares {' '.join(map(str, shares))}: {output} would get none of the "
                f"{index.num_documents} documents"
            )
    described = _described([prefix])
    for output, begin, end in zip(outputs, bounds[:-1], bounds[1:], strict=True):
        with DatasetWriter(output, index.dtype) as writer:
            _copy(index, writer, begin, end)
        _finish(output, "data split", [prefix], described, documents=[begin, end])


def shuffle(prefix: str, output: str, *, seed: int) -> None:
    """Writes a dataset's documents in a random order that depends only on their number and the seed."""
    _refuse_overwriting([prefix], [output])
    index = open_index(prefix)
    described = _described([prefix])
    total = index.num_documents
    with DatasetWriter(output, index.dtype) as writer, open(bin_path(prefix), "rb", buffering=0) as source:
        for begin, end in chunks(total, _CHUNK_DOCUMENTS):
            documents = permuted(np.arange(begin, end), total, seed)
            first, last = index.document_indices[documents], index.document_indices[documents + 1]
            starts, stops = (index.sequence_starts(bound) * index.dtype.itemsize for bound in (first, last))
            counts = last - first
            ends = np.cumsum(counts)
            sequences = np.repeat(first - (ends - counts), counts) + np.arange(counts.sum())
            pieces = _read(source.fileno(), zip(starts.tolist(), stops.tolist(), strict=True))
            writer.add(pieces, index.lengths[sequences], ends)
            index.release()
    _finish(output, "data shuffle", [prefix], described, seed=seed)


def permuted(numbers: npt.NDArray[np.int64], total: int, seed: int) -> npt.NDArray[np.int64]:
    """Applies a seeded random permutation of `range(total)` to the given numbers; memory does not grow with `total`.

    A Feistel network permutes the range up to the next power of four; a number that lands outside `range(total)` is
    permuted again.
    """
    half = max((int(total - 1).bit_length() + 1) // 2, 1) if total else 1
    mask = np.uint64((1 << half) - 1)
    keys = [
        np.frombuffer(hashlib.sha256(f"{seed}:{turn}".encode()).digest()[:8], dtype=np.uint64)[0]
        for turn in range(_ROUNDS)
    ]
    values = numbers.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside[outside] = values[outside] >= total
    return values.astype(np.int64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hashes 64-bit numbers with SplitMix64's finaliser (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _copy(index: Index, writer: DatasetWriter, begin: int, end: int) -> None:
    """Appends documents `begin` .. `end - 1` of a dataset to the writer."""
    with open(bin_path(index.prefix), "rb", buffering=0) as source:
        for a, b in chunks(end - begin, _CHUNK_DOCUMENTS):
            ends = np.asarray(index.document_indices[begin + a : begin + b + 1])
            first, last = int(ends[0]), int(ends[-1])
            start, stop = (
                index.sequence_start(sequence) * index.dtype.itemsize for sequence in (first, last)
            )
            writer.add(_read(source.fileno(), [(start, stop)]), index.lengths[first:last], ends[1:] - first)
            index.release()


def _read(descriptor: int, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yields the bytes of the given ranges [start, stop) of a file, in pieces of bounded size."""
    for start, stop in ranges:
        for begin, end in chunks(stop - start, _READ_BYTES):
            yield os.pread(descriptor, end - begin, start + begin)


def _refuse_overwriting(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raises `ValueError` if an output is also an input."""
    for output in outputs:
        if any(os.path.realpath(bin_path(output)) == os.path.realpath(bin_path(prefix)) for prefix in inputs):
            raise ValueError(f"--output-prefix {output}: is also an input; give another prefix")


def _described(prefixes: Sequence[str]) -> dict[str, Any]:
    """Returns the tokenizer and per-layer entries of the inputs' manifests, which must not contradict each other."""
    manifests = [(prefix, manifest) for prefix in prefixes if (manifest := read_manifest(prefix)) is not None]
    result: dict[str, Any] = {"tokenizer": None, "per_layer": None}
    seen: dict[str, tuple[str, Any]] = {}
    for prefix, manifest in manifests:
        per_layer = manifest.get("per_layer")
        if per_layer is not None:
            per_layer = {
                key: per_layer.get(key) for key in ("strategy", "vocab_size", "vocab_file", "vocab_checksum")
            }
        facts = {
            "tokenizer": (manifest.get("tokenizer") or {}).get("fingerprint"),
            "token that begins a document": (manifest.get("tokenizer") or {}).get(PREPENDED_BOS),
            "per-layer strategy": per_layer and per_layer["strategy"],
            "per-layer vocabulary": per_layer and per_layer["vocab_checksum"],
        }
        for name, value in facts.items():
            other, known = seen.setdefault(name, (prefix, value))
            if known != value:
                raise ValueError(
                    f"cannot merge: the {name} of {other} is {known}, but that of {prefix} is {value}"
                )
        result["tokenizer"] = result["tokenizer"] or manifest.get("tokenizer")
        result["per_layer"] = result["per_layer"] or per_layer
    if len(manifests) != len(prefixes):  # an input of unknown origin
        return {"tokenizer": None, "per_layer": None}
    return result


def _finish(output: str, tool: str, inputs: Sequence[str], described: dict[str, Any], **extra: Any) -> None:
    """Writes the manifest of a new dataset."""
    if described["per_layer"] is not None:
        extra["per_layer"] = described["per_layer"]
    files = [bin_path(prefix) for prefix in inputs]
    write_manifest(output, tool=tool, tokenizer=described["tokenizer"], inputs=files, extra=extra)


def length_histogram(index: Index) -> Iterator[tuple[int, int]]:
    """Yields (smallest length, number of documents) for documents of 0, 1, 2-3, 4-7, ... tokens; skips empty bins."""
    counts = np.zeros(65, dtype=np.int64)
    for begin, end in chunks(index.num_documents, _CHUNK_DOCUMENTS):
        sizes = np.diff(index.document_starts(begin, end + 1))
        bins = np.zeros(len(sizes), dtype=np.int64)
        bins[sizes > 0] = np.floor(np.log2(sizes[sizes > 0])).astype(np.int64) + 1
        counts += np.bincount(bins, minlength=65)
        index.release()
    for number in np.flatnonzero(counts).tolist():
        yield (0 if number == 0 else 1 << (number - 1)), int(counts[number])
