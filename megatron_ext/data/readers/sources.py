"""Finds the files to read, and divides them into chunks.

The content of a chunk, by kind of input:

lines (.jsonl, .json, plain text)     a byte range, which owns the lines that start in it
compressed files, stdin, pipes        a block of whole lines, which the parent process reads and sends to a worker
.parquet, .arrow, .feather            a row group or record batch
plain text with --text-unit file      a file

Plain text is .txt and, with an explicit --text-unit, also every file whose suffix does not imply another format.
"""

import glob
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from megatron_ext.config.groups.preprocess_config import InputConfig
from megatron_ext.data.indexed.same_file import refuse_same_file
from megatron_ext.data.readers import columns
from megatron_ext.data.readers.compression import SUFFIXES, Compression, open_packed
from megatron_ext.data.readers.content import check_is_text
from megatron_ext.data.readers.lines import LINES, LONG, LONG_END, scan_lines

STDIN = "-"
_STDIN_DESCRIPTOR = 0
_JSON_SUFFIXES = (".jsonl", ".json")
MAX_CHUNK_BYTES = 16 << 20
MIN_CHUNK_BYTES = 256 << 10
STREAM_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class TextSource:
    """One input file.

    Attributes:
        path: the path as the user wrote it or as a pattern matched it; "-" for standard input.
        format: what the file holds.
        compression: how the file is compressed; None if it is not.
        is_stream: whether it can only be read from start to end (a compressed file, standard input, a pipe).
    """

    path: str
    format: Literal["json", "text", "whole_text", "parquet", "arrow"]
    compression: Compression | None
    is_stream: bool

    @property
    def has_columns(self) -> bool:
        """True if the file has columns, with one document per row."""
        return self.format in columns.UNITS

    def size(self) -> int | None:
        """Returns the number of bytes on disk; None for standard input and pipes."""
        if self.path == STDIN or (self.is_stream and self.compression is None):
            return None
        return os.path.getsize(self.path)


@dataclass(frozen=True)
class Chunk:
    """The part of a source that one worker handles at a time.

    Attributes:
        source_index: number of the source, counted in input order.
        source: the source itself.
        start, end: range of bytes in the content after decompression; for columns, the number of the row group or
            record batch, and that number plus one.
        input_bytes: number of bytes on disk that the chunk takes up, for the progress display.
        data: the content of the chunk if the source is a stream; otherwise None.
        first_line: number of lines (rows) before the chunk; None if counting them would require
            reading the source again.
        long_line: whether the chunk is a single line over the limit, whose content is not kept here.
    """

    source_index: int
    source: TextSource
    start: int
    end: int
    input_bytes: int
    data: bytes | None = None
    first_line: int | None = None
    long_line: bool = False

    def __str__(self) -> str:
        if self.source.has_columns:
            return f"{self.source.path}, {columns.UNITS[self.source.format]} {self.start}"
        return f"{self.source.path}, bytes {self.start} to {self.end}"


def expand_inputs(config: InputConfig) -> list[TextSource]:
    """Returns the sources that `--input` names; the files that a pattern matches are sorted.

    Raises:
        FileNotFoundError, PermissionError, ValueError: an argument cannot be read, or names a file a second time; the
            one-line message names the argument.
    """
    sources: list[TextSource] = []
    spelled: list[tuple[str, str | int]] = []
    for argument in config.input:
        if argument == STDIN:
            sources.append(TextSource(STDIN, "json", None, True))
            spelled.append((STDIN, _STDIN_DESCRIPTOR))
            continue
        paths = [argument] if os.path.exists(argument) else sorted(glob.glob(argument, recursive=True))
        if not paths:
            kind = "matches no file" if glob.has_magic(argument) else "no such file"
            raise FileNotFoundError(f"--input {argument}: {kind}")
        sources += [_source(path, config) for path in paths]
        spelled += [(path if path == argument else f"{path} (of {argument})", path) for path in paths]
    refuse_same_file("--input", spelled)
    return sources


def _source(path: str, config: InputConfig) -> TextSource:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ValueError(
            f"--input {path}: is a directory; to read its files, pass a pattern such as {path}/*.jsonl"
        )
    if not os.access(path, os.R_OK):
        raise PermissionError(f"--input {path}: no permission to read the file")
    name, suffix = os.path.splitext(path)
    compression = SUFFIXES.get(suffix.lower())
    if compression is not None:
        suffix = os.path.splitext(name)[1]
    suffix = suffix.lower()
    is_regular = stat.S_ISREG(mode)
    is_stream = compression is not None or not is_regular
    if suffix in columns.FORMATS:
        file_format = columns.FORMATS[suffix]
        if is_stream:
            raise ValueError(
                f"--input {path}: a {suffix} file must be neither compressed nor a pipe; unpack it to a file"
            )
        columns.check_columns(path, file_format, config.json_keys)
        return TextSource(path, file_format, None, False)
    source = _text_source(path, suffix, compression, is_stream, config)
    if is_regular:  # the content of a pipe is checked when it is read
        file, read = open_stream(source)
        with file:
            check_is_text(read, path)
    return source


def _text_source(
    path: str, suffix: str, compression: Compression | None, is_stream: bool, config: InputConfig
) -> TextSource:
    if suffix != ".txt" and (config.text_unit is None or suffix in _JSON_SUFFIXES):
        return TextSource(path, "json", compression, is_stream)
    if len(config.json_keys) > 1:
        raise ValueError(
            f"--json-keys {' '.join(config.json_keys)}: {path} is plain text, which has no keys; give one key"
        )
    if config.text_unit != "file":
        return TextSource(path, "text", compression, is_stream)
    if is_stream:
        raise ValueError(
            f"--text-unit file: {path} must be neither compressed nor a pipe; unpack it to a file"
        )
    return TextSource(path, "whole_text", None, False)


def chunk_size(sources: list[TextSource]) -> int:
    """Returns the number of bytes in a chunk of plain lines: a 64th of the input, within limits."""
    total = sum(source.size() or 0 for source in sources)
    return min(max(total // 64, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


def plan_chunks(
    sources: list[TextSource],
    chunk_bytes: int,
    max_line_bytes: int,
    on_long_line: Callable[[bytes], None] | None = None,
) -> Iterator[Chunk]:
    """Divides the sources into chunks, in order; streams are read as the iterator advances.

    Args:
        sources: what to read.
        chunk_bytes: number of bytes in a chunk of plain lines.
        max_line_bytes: a longer line of a stream becomes a separate chunk, marked `long_line`.
        on_long_line: receives the pieces of such a line before its chunk is yielded; if None, the chunk is yielded
            before the whole line is read.
    """
    for index, source in enumerate(sources):
        if source.is_stream:
            yield from _stream_chunks(index, source, max_line_bytes, on_long_line)
        elif source.has_columns:
            yield from _column_chunks(index, source)
        else:
            size = source.size() or 0
            step = max(size, 1) if source.format == "whole_text" else chunk_bytes
            for start in range(0, max(size, source.format == "whole_text"), step):
                end = min(start + step, size)
                yield Chunk(index, source, start, end, end - start)


def _column_chunks(index: int, source: TextSource) -> Iterator[Chunk]:
    counts = list(columns.row_counts(source.path, source.format))
    share = (source.size() or 0) // max(len(counts), 1)
    rows = 0
    for part, count in enumerate(counts):
        yield Chunk(index, source, part, part + 1, share, first_line=rows)
        rows += count


def open_stream(source: TextSource) -> tuple[BinaryIO, Callable[[int], bytes]]:
    """Opens a source; returns its file, whose position shows the progress, and a function `read(n)` for its content.

    The content is decompressed.
    """
    if source.path == STDIN:
        return sys.stdin.buffer, sys.stdin.buffer.read
    file = open(source.path, "rb")  # noqa: SIM115 - the caller closes it
    if source.compression is not None:
        return file, open_packed(file, source.path, source.compression)
    return file, file.read


class _StreamCutter:
    """Collects the spans of a stream into chunks, and counts their bytes and lines."""

    def __init__(self, index: int, source: TextSource, packed_position: Callable[[], int] | None) -> None:
        self._index, self._source, self._packed_position = index, source, packed_position
        self._parts: list[bytes] = []
        self._start, self.position, self._line, self._consumed = 0, 0, 0, 0

    def add(self, data: bytes) -> bool:
        """Adds whole lines; returns True when the chunk is full."""
        self._parts.append(data)
        self.position += len(data)
        return self.position - self._start >= STREAM_CHUNK_BYTES

    def take(self, *, long_line: bool = False) -> Iterator[Chunk]:
        """Yields the chunk of the lines added so far, or of the skipped long line; without either, yields nothing."""
        if self.position > self._start:
            consumed = self._packed_position() if self._packed_position else self.position
            data = None if long_line else b"".join(self._parts)
            yield Chunk(
                self._index, self._source, self._start, self.position, consumed - self._consumed, data,
                first_line=self._line, long_line=long_line,
            )  # fmt: skip
            self._line += 1 if data is None else data.count(b"\n")
            self._consumed, self._start, self._parts = consumed, self.position, []

    def skip(self) -> None:
        """Makes the next chunk start after the bytes skipped since the last one."""
        self._start = self.position


def _checked(read: Callable[[int], bytes], path: str) -> Callable[[int], bytes]:
    """Wraps `read` so that its first call checks the beginning of the content."""
    head: bytes | None = None

    def checked(size: int) -> bytes:
        nonlocal head
        if head is None:
            head = check_is_text(read, path)
        if head:
            data, head = head, b""
            return data
        return read(size)

    return checked


def _stream_chunks(
    index: int, source: TextSource, max_line_bytes: int, on_long_line: Callable[[bytes], None] | None
) -> Iterator[Chunk]:
    file, read = open_stream(source)
    read = _checked(read, source.path)
    cutter = _StreamCutter(index, source, file.tell if source.compression else None)
    announced = False
    with file:
        for span in scan_lines(read, 0, None, max_line_bytes):
            if span.kind == LINES:
                if cutter.add(span.data):
                    yield from cutter.take()
                continue
            if not announced:
                yield from cutter.take()
            cutter.position += len(span.data)
            if on_long_line is not None:
                on_long_line(span.data)
            elif not announced:
                yield from cutter.take(long_line=True)
            announced = span.kind == LONG
            if span.kind == LONG_END:
                if on_long_line is not None:
                    yield from cutter.take(long_line=True)
                cutter.skip()
        yield from cutter.take()
