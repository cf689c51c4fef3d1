"""Writes the shard of one chunk: a file of tokens and a file of lengths for every key, and a description.

The files of shard number 12:

00000012.0.bin      tokens of all documents under the first key
00000012.0.lengths  int32, number of tokens in each sequence (a document, or a sentence)
00000012.0.counts   int32, number of sequences in each document; 0 for an empty one
00000012.rejects    JSON lines [line, offset, reason]; lines are counted from the start of the chunk
00000012.raw        the rejected lines themselves (only with --on-error quarantine)
00000012.json       counts, sizes and CRC-32 of the other files; written last, so if it exists, the shard is finished
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ext.config.groups.preprocess_config import OnError
from megatron_ext.data.preprocess.encoding import Encoder, Ids
from megatron_ext.data.preprocess.sentences import Splitting, splitter_of
from megatron_ext.data.readers import Batch, Chunk, Reject, Text, read_chunk


class RejectedLine(Exception):
    """Raised for a line that is not a document if `on_error` is "fail"; holds the line's position in the chunk."""

    def __init__(self, line: int, offset: int | None, reason: str) -> None:
        super().__init__(line, offset, reason)
        self.line, self.offset, self.reason = line, offset, reason


@dataclass(frozen=True)
class ShardOptions:
    """Settings that every worker of a run needs in addition to its tokenizer."""

    directory: str
    """Directory in which the shards are written."""

    keys: tuple[str, ...]
    """Values of `--json-keys`."""

    dtype: str
    """Type of one token, "uint16" or "int32"."""

    vocab_size: int
    """Number of ids; every token id must be smaller."""

    eod: int | None
    """Id of the token that ends every document; None without `--append-eod`."""

    bos: int | None
    """Id of the token that begins every document; None without `--prepend-bos`."""

    on_error: OnError
    """Action for a line that is not a document."""

    skip_empty: bool
    """True to leave out documents whose texts are empty under every key."""

    max_line_bytes: int
    """Limit on the length of a line; longer lines are rejected."""

    splitting: Splitting | None = None
    """Settings for splitting documents into sentences; None makes each document one sequence."""


@dataclass
class ShardInfo:
    """Counts for one shard, or for several together.

    Attributes:
        documents: number of documents written, empty ones included.
        tokens: for every key, the number of tokens.
        empty: for every key, the number of documents without a token.
        skipped_empty: number of documents left out because they are empty.
        lines: number of lines read.
        blank: number of lines with nothing but white space.
        rejected: number of lines that are not documents.
        text_bytes: number of bytes read, after decompression.
        input_bytes: number of bytes read from disk.
        files: maps the suffix of each file of the shard to its size and CRC-32.
    """

    documents: int = 0
    tokens: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    skipped_empty: int = 0
    lines: int = 0
    blank: int = 0
    rejected: int = 0
    text_bytes: int = 0
    input_bytes: int = 0
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def shard_path(directory: str, index: int, suffix: str) -> Path:
    """Returns the path of the file of shard `index` that has a given suffix."""
    return Path(directory, f"{index:08d}.{suffix}")


class _CheckedFile:
    """A file that keeps track of its size and CRC-32 while it is written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self.size, self.crc = 0, 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def close(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes the shard of one chunk."""

    def __init__(self, options: ShardOptions, index: int) -> None:
        self._options = options
        self._index = index
        self._files: dict[str, _CheckedFile] = {}
        self.info = ShardInfo(tokens=[0] * len(options.keys), empty=[0] * len(options.keys))
        for key in range(len(options.keys)):
            self._file(f"{key}.bin"), self._file(f"{key}.lengths"), self._file(f"{key}.counts")

    def _file(self, suffix: str) -> _CheckedFile:
        if suffix not in self._files:
            self._files[suffix] = _CheckedFile(shard_path(self._options.directory, self._index, suffix))
        return self._files[suffix]

    def keep_raw(self, data: bytes) -> None:
        """Adds bytes of a rejected line to the quarantine file."""
        self._file("raw").write(data)

    def add(self, batch: Batch, encoder: Encoder | None) -> None:
        """Tokenizes and writes a batch's documents, and records its rejected lines.

        The encoder may be None if the batch has only rejected lines.

        Raises:
            RejectedLine: a line is not a document and `on_error` is "fail".
        """
        for reject in batch.rejects:
            self._reject(reject)
        encoded = [self._encode(texts, encoder) for texts in batch.texts]
        keep = np.ones(len(batch.texts[0]), dtype=bool)
        if self._options.skip_empty:
            keep = np.any([counts > 0 for _, _, counts in encoded], axis=0)
        for key, (tokens, lengths, counts) in enumerate(encoded):
            self._file(f"{key}.bin").write(tokens)
            self._file(f"{key}.lengths").write(lengths.astype("<i4").tobytes())
            self._file(f"{key}.counts").write(counts[keep].astype("<i4").tobytes())
            self.info.tokens[key] += int(lengths.sum())
            self.info.empty[key] += int((counts[keep] == 0).sum())
        self.info.documents += int(keep.sum())
        self.info.skipped_empty += int((~keep).sum())
        self.info.lines += batch.lines
        self.info.blank += batch.blank
        self.info.text_bytes += batch.text_bytes

    def _reject(self, reject: Reject) -> None:
        if self._options.on_error == "fail":
            raise RejectedLine(reject.line, reject.offset, reject.reason)
        self.info.rejected += 1
        record = json.dumps([reject.line, reject.offset, reject.reason])
        self._file("rejects").write(record.encode() + b"\n")
        if self._options.on_error == "quarantine" and reject.raw is not None:
            self.keep_raw(reject.raw)

    def _encode(self, texts: list[Text], encoder: Encoder | None) -> tuple[bytes, Ids, Ids]:
        """Returns the tokens, the length of each non-empty sequence, and the number of non-empty sequences of each
        document.
        """
        split = splitter_of(self._options.splitting)
        sequences = [split(text) if isinstance(text, str) else text for text in texts]
        document_of = np.repeat(np.arange(len(texts)), list(map(len, sequences)))
        encoded = list(encoder.encode(list(chain.from_iterable(sequences)))) if encoder is not None else []
        ids = _joined([ids for ids, _ in encoded])
        lengths = _joined([lengths for _, lengths in encoded])
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._options.vocab_size:
            raise ValueError(
                f"the tokenizer gave ids from {int(ids.min())} to {int(ids.max())}, but its vocabulary has only "
                f"{self._options.vocab_size} ids"
            )
        filled = lengths > 0
        counts = np.bincount(document_of[filled], minlength=len(texts))
        ids, lengths = self._framed(ids, lengths[filled], counts)
        return ids.astype(self._options.dtype).tobytes(), lengths, counts

    def _framed(self, ids: Ids, lengths: Ids, counts: Ids) -> tuple[Ids, Ids]:
        """Puts the begin and end tokens that the options name around each document that is not empty.

        Args:
            ids: the tokens of all documents.
            lengths: length of each sequence; none is empty.
            counts: number of sequences of each document.
        """
        ends = np.cumsum(counts)[counts > 0]
        if self._options.eod is not None:
            ids = np.insert(ids, np.cumsum(lengths)[ends - 1], self._options.eod)
            lengths = lengths + np.bincount(ends - 1, minlength=len(lengths))
        if self._options.bos is not None:
            firsts = ends - counts[counts > 0]
            ids = np.insert(ids, (np.cumsum(lengths) - lengths)[firsts], self._options.bos)
            lengths = lengths + np.bincount(firsts, minlength=len(lengths))
        return ids, lengths

    def finish(self, input_bytes: int) -> ShardInfo:
        """Closes the shard's files and writes its description, which marks the shard as finished."""
        self.close()
        self.info.input_bytes = input_bytes
        self.info.files = {suffix: (file.size, file.crc) for suffix, file in self._files.items()}
        final = shard_path(self._options.directory, self._index, "json")
        temporary = final.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self.info)), encoding="utf-8")
        os.replace(temporary, final)
        return self.info

    def close(self) -> None:
        """Closes the shard's files."""
        for file in self._files.values():
            file.close()


def _joined(arrays: list[Ids]) -> Ids:
    if len(arrays) == 1:  # perhaps one huge document, which is not copied
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def encode_chunk(
    options: ShardOptions,
    index: int,
    chunk: Chunk,
    encoder: Encoder,
    limit: int | None = None,
    report: Callable[[ShardInfo], None] = lambda info: None,
) -> ShardInfo:
    """Reads and tokenizes one chunk, and writes its shard.

    Args:
        options: how to write shards.
        index: number of the chunk, which names the shard's files.
        chunk: what to read.
        encoder: turns texts into ids.
        limit: stop after this many documents.
        report: called after every batch with the counts so far.

    Raises:
        RejectedLine: a line is not a document and `on_error` is "fail".
    """
    writer = ShardWriter(options, index)
    keep_raw = writer.keep_raw if options.on_error == "quarantine" else None
    try:
        for batch in read_chunk(chunk, options.keys, options.max_line_bytes, keep_raw, limit):
            writer.add(batch, encoder)
            report(writer.info)
        return writer.finish(chunk.input_bytes)
    finally:
        writer.close()


def read_finished_shard(directory: str, index: int, *, check: bool) -> ShardInfo | None:
    """Reads a finished shard's description; returns None if there is none or, with `check`, a file is damaged."""
    path = shard_path(directory, index, "json")
    if not path.is_file():
        return None
    info = ShardInfo(**json.loads(path.read_text(encoding="utf-8")))
    if check:
        for suffix, (size, crc) in info.files.items():
            file = shard_path(directory, index, suffix)
            if not file.is_file() or file.stat().st_size != size or zlib.crc32(file.read_bytes()) != crc:
                return None
    return info


def remove_shard(directory: str, index: int) -> None:
    """Removes the files of a shard, its description first."""
    shard_path(directory, index, "json").unlink(missing_ok=True)
    for path in Path(directory).glob(f"{index:08d}.*"):
        path.unlink(missing_ok=True)
