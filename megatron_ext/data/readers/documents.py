"""Parses a chunk, the part of a file that one worker handles at a time, into documents.

A line that is not a document is rejected, with its position and the reason.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_ext.config.groups.preprocess_config import InputConfig
from megatron_ext.data.readers.columns import read_rows
from megatron_ext.data.readers.lines import LINES, LONG, scan_lines
from megatron_ext.data.readers.sources import MAX_CHUNK_BYTES, Chunk, expand_inputs, plan_chunks

_BOM = b"\xef\xbb\xbf"
_NO_OBJECT = ("malformed JSON", "expected a JSON object")
_FIRST_LINE_HINT = (
    " (JSON lines hold one object per line; for plain text, name the file .txt or give --text-unit)"
)
_decode_json = json.JSONDecoder().decode

Text = str | list[str]
"""A document's text, or its sentences, each of which is a sequence of the dataset."""


@dataclass
class Reject:
    """A line that is not a document.

    Attributes:
        line: number of the line (or row) within the chunk, counted from 0.
        offset: position of its first byte in the source, after decompression; None for a row.
        reason: why it is not a document, in words for the user.
        raw: the line as it was read, for the quarantine file; None if `on_long_line` received it in pieces.
    """

    line: int
    offset: int | None
    reason: str
    raw: bytes | None


@dataclass
class Batch:
    """Consecutive documents of a chunk.

    Attributes:
        texts: for every key, the texts of the documents, in order; all lists have the same length.
        places: for every document, the number of its line, counted as in `Reject`.
        rejects: the rejected lines between these documents.
        lines: number of lines read: documents, rejected lines and blank lines.
        blank: number of lines with nothing but white space, which are neither documents nor errors.
        text_bytes: number of bytes read.
    """

    texts: list[list[Text]]
    places: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    lines: int = 0
    blank: int = 0
    text_bytes: int = 0


class _NotADocument(ValueError):
    """Raised for a line that is not a document; the message is the reason."""


def read_chunk(
    chunk: Chunk,
    keys: tuple[str, ...],
    max_line_bytes: int,
    on_long_line: Callable[[bytes], None] | None = None,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yields the documents of a chunk, about a megabyte at a time.

    Args:
        chunk: what to read.
        keys: keys of the JSON objects, or names of columns; for plain text only the number of keys is used.
        max_line_bytes: a longer line is rejected.
        on_long_line: receives the pieces of a line that is too long for memory, after the batch that rejects the line.
        limit: stop after this many documents.
    """
    for batch in _read(chunk, keys, max_line_bytes, on_long_line):
        if limit is not None:
            _cut(batch, limit)
            limit -= len(batch.texts[0])
        yield batch
        if limit == 0:
            return


def iter_documents(config: InputConfig) -> Iterator[tuple[str, ...]]:
    """Yields each document of `--input` as a tuple with one text per key; reads the files in this process.

    The sentences of a document are joined by spaces.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is not a document; the message names the file and the line's first byte.
    """
    sources = expand_inputs(config)
    left = config.max_documents
    for chunk in plan_chunks(sources, MAX_CHUNK_BYTES, config.max_line_bytes):
        for batch in read_chunk(chunk, config.json_keys, config.max_line_bytes, limit=left):
            if batch.rejects:
                reject = batch.rejects[0]
                place = (
                    f"row {(chunk.first_line or 0) + reject.line + 1}"
                    if reject.offset is None
                    else f"byte {reject.offset}"
                )
                raise ValueError(f"{chunk.source.path}: {place}: {reject.reason}")
            for texts in zip(*batch.texts, strict=True):
                yield tuple(text if isinstance(text, str) else " ".join(text) for text in texts)
            if left is not None:
                left -= len(batch.texts[0])
        if left == 0:
            return


def _read(
    chunk: Chunk, keys: tuple[str, ...], max_line_bytes: int, on_long_line: Callable[[bytes], None] | None
) -> Iterator[Batch]:
    if chunk.long_line:
        reject = _too_long(0, chunk.start, max_line_bytes)
        yield Batch([[] for _ in keys], rejects=[reject], lines=1, text_bytes=chunk.end - chunk.start)
    elif chunk.source.has_columns:
        yield from _read_columns(chunk, keys, max_line_bytes)
    elif chunk.source.format == "whole_text":
        yield _read_whole_file(chunk, max_line_bytes, on_long_line)
    elif chunk.data is not None:
        yield _parse_lines(chunk, keys, chunk.start, chunk.data, 0, max_line_bytes)
    else:
        yield from _read_range(chunk, keys, max_line_bytes, on_long_line)


def _cut(batch: Batch, limit: int) -> None:
    """Shortens a batch to its first documents, and drops the lines that were rejected after them."""
    if len(batch.texts[0]) >= limit:
        last = batch.places[limit - 1]
        batch.rejects = [reject for reject in batch.rejects if reject.line < last]
        batch.texts = [texts[:limit] for texts in batch.texts]
        batch.places = batch.places[:limit]


def _read_range(
    chunk: Chunk, keys: tuple[str, ...], max_line_bytes: int, on_long_line: Callable[[bytes], None] | None
) -> Iterator[Batch]:
    line, in_long_line = 0, False
    with open(chunk.source.path, "rb") as file:
        file.seek(max(chunk.start - 1, 0))
        for span in scan_lines(file.read, chunk.start, chunk.end, max_line_bytes):
            if span.kind == LINES:
                batch = _parse_lines(chunk, keys, span.offset, span.data, line, max_line_bytes)
            else:
                batch = Batch([[] for _ in keys], text_bytes=len(span.data))
                if not in_long_line:
                    batch.rejects.append(_too_long(line, span.offset, max_line_bytes))
                    batch.lines = 1
            line += batch.lines
            yield batch
            in_long_line = span.kind == LONG
            if span.kind != LINES and on_long_line is not None:
                on_long_line(span.data)


def _parse_lines(
    chunk: Chunk, keys: tuple[str, ...], offset: int, data: bytes, first_line: int, max_line_bytes: int
) -> Batch:
    """Parses whole lines; `offset` and `first_line` are the position and the number of the first line."""
    batch = Batch([[] for _ in keys], text_bytes=len(data))
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if offset == 0 and lines and lines[0].startswith(_BOM):
        lines[0] = lines[0][len(_BOM) :]
        offset = len(_BOM)
    is_json = chunk.source.format == "json"
    batch.lines = len(lines)
    start = offset
    for number, line in enumerate(lines):
        offset, start = start, start + len(line) + 1
        if not line or line.isspace():
            batch.blank += 1
            continue
        try:
            if len(line) > max_line_bytes:
                raise _NotADocument(_limit_message(max_line_bytes))
            texts: list[Text] = _json_texts(line, keys) if is_json else [_utf8(line.removesuffix(b"\r"))]
        except _NotADocument as error:
            reason = str(error)
            if is_json and offset <= len(_BOM) and reason.startswith(_NO_OBJECT):
                reason += _FIRST_LINE_HINT
            batch.rejects.append(Reject(first_line + number, offset, reason, line + b"\n"))
            continue
        batch.places.append(first_line + number)
        for column, text in zip(batch.texts, texts, strict=True):
            column.append(text)
    return batch


def _json_texts(line: bytes, keys: tuple[str, ...]) -> list[Text]:
    try:
        record = _decode_json(line.decode())
    except UnicodeDecodeError as error:
        raise _NotADocument(f"invalid UTF-8 at byte {error.start} of the line") from None
    except RecursionError:
        raise _NotADocument("malformed JSON: nested too deeply") from None
    except ValueError as error:
        raise _NotADocument(f"malformed JSON: {error}") from None
    if not isinstance(record, dict):
        raise _NotADocument(f"expected a JSON object, found {_type_name(record)}")
    return [_checked_text(record[key], key) if key in record else _missing(key) for key in keys]


def _missing(key: str) -> str:
    raise _NotADocument(f'missing key "{key}"')


def _checked_text(value: object, key: str) -> Text:
    if isinstance(value, list):
        return [_checked_string(sentence, key, "a list with ", "only strings") for sentence in value]
    return _checked_string(value, key, "", "a string")


def _checked_string(value: object, key: str, where: str, wanted: str) -> str:
    if not isinstance(value, str):
        raise _NotADocument(f'key "{key}" holds {where}{_type_name(value)}, not {wanted}')
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # an escape such as \ud800 without the second half of the pair
            raise _NotADocument(f'key "{key}": unpaired surrogate at character {error.start}') from None
    return value


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _NotADocument(f"invalid UTF-8 at byte {error.start}") from None


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _limit_message(max_line_bytes: int) -> str:
    return f"longer than --max-line-bytes {max_line_bytes}"


def _too_long(line: int, offset: int, max_line_bytes: int) -> Reject:
    return Reject(line, offset, _limit_message(max_line_bytes), None)


def _read_whole_file(
    chunk: Chunk, max_line_bytes: int, on_long_line: Callable[[bytes], None] | None
) -> Batch:
    size = chunk.end
    batch = Batch([[]], lines=1, text_bytes=size)
    with open(chunk.source.path, "rb") as file:
        if size > max_line_bytes:
            batch.rejects.append(_too_long(0, 0, max_line_bytes))
            while on_long_line is not None and (piece := file.read(1 << 20)):
                on_long_line(piece)
            return batch
        data = file.read(size)
    try:
        batch.texts[0].append(_utf8(data.removeprefix(_BOM)))
        batch.places.append(0)
    except _NotADocument as error:
        batch.rejects.append(Reject(0, 0, str(error), data))
    return batch


def _read_columns(chunk: Chunk, keys: tuple[str, ...], max_line_bytes: int) -> Iterator[Batch]:
    first_row = 0
    for size, columns in read_rows(chunk.source.path, chunk.source.format, chunk.start, keys):
        batch = Batch([[] for _ in keys], lines=len(columns[0]), text_bytes=size)
        for row, record in enumerate(zip(*columns, strict=True), first_row):
            try:
                texts = [_row_text(v, k, max_line_bytes) for v, k in zip(record, keys, strict=True)]
            except _NotADocument as error:
                raw = json.dumps(dict(zip(keys, map(_printable, record), strict=True))).encode() + b"\n"
                batch.rejects.append(Reject(row, None, str(error), raw))
                continue
            batch.places.append(row)
            for column, text in zip(batch.texts, texts, strict=True):
                column.append(text)
        first_row += batch.lines
        yield batch


def _row_text(value: bytes | None, key: str, max_line_bytes: int) -> str:
    if value is None:
        raise _NotADocument(f'column "{key}" holds null, not a string')
    if len(value) > max_line_bytes:
        raise _NotADocument(_limit_message(max_line_bytes))
    return _utf8(value)


def _printable(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")
