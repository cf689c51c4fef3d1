"""Divides bytes into whole lines, with bounded memory however long a line is.

A byte range `[start, end)` of a file owns the lines whose first byte lies in it, so adjacent ranges cover every line
once: a partial line at the beginning belongs to the range before, and the last line is read beyond `end`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 1 << 20
LINES, LONG, LONG_END = "lines", "long", "long_end"

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of a source.

    Attributes:
        kind: `LINES` for whole lines, `LONG` for a part of a line over the limit, `LONG_END` for its last part (maybe
            empty).
        offset: position of the first byte in the source.
        data: the bytes, newlines included (the last line of a source may have none).
    """

    kind: str
    offset: int
    data: bytes


def scan_lines(read: Read, start: int, end: int | None, max_line_bytes: int) -> Iterator[Span]:
    """Yields the lines that start in `[start, end)`, about `BLOCK_BYTES` at a time.

    Args:
        read: `read(n)` returns up to n bytes, none at the end; it must begin at byte `max(start - 1, 0)` of the source.
        start: first byte of the range.
        end: end of the range; None for the end of the file.
        max_line_bytes: a longer line is yielded in parts. A longer line that ends within the block where it was found
            may still be among `LINES`, so the caller must check the length of every line.
    """
    tail, tail_offset = bytearray(), 0
    in_long_line = False
    for offset, piece in _owned(read, start, end):
        if in_long_line:
            cut = piece.find(b"\n") + 1
            yield Span(LONG_END if cut else LONG, offset, piece[:cut] if cut else piece)
            if not cut:
                continue
            in_long_line = False
            offset, piece = offset + cut, piece[cut:]
        if not tail:
            tail_offset = offset
        cut = piece.rfind(b"\n") + 1
        tail += piece[:cut] if cut else piece
        if cut:
            yield Span(LINES, tail_offset, bytes(tail))
            tail, tail_offset = bytearray(piece[cut:]), offset + cut
        if len(tail) > max_line_bytes:
            yield Span(LONG, tail_offset, bytes(tail))
            tail, in_long_line = bytearray(), True
    if in_long_line:
        yield Span(LONG_END, 0, b"")
    elif tail:
        yield Span(LINES, tail_offset, bytes(tail))


def _owned(read: Read, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, bytes) of the lines that start in the range `[start, end)`, piece by piece."""
    position = max(start - 1, 0)
    skipping = start > 0  # skip to the first newline, because that line started before the range
    complete = True
    while end is None or position < end:
        piece = read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - position))
        if not piece:
            return
        offset, position = position, position + len(piece)
        if skipping:
            cut = piece.find(b"\n") + 1
            if not cut:
                continue
            skipping = False
            offset, piece = offset + cut, piece[cut:]
        if piece:
            complete = piece.endswith(b"\n")
            yield offset, piece
    if skipping:
        return
    while not complete and (piece := read(BLOCK_BYTES)):
        cut = piece.find(b"\n") + 1
        complete = cut > 0
        yield position, piece[:cut] if cut else piece
        position += len(piece)


def count_line_starts(path: str, start: int, end: int) -> int:
    """Returns how many lines of a file start in `[start, end)`; a line starts at byte 0 and after every newline."""
    count, position = int(start == 0 < end), max(start - 1, 0)
    with open(path, "rb") as file:
        file.seek(position)
        while position < end - 1 and (piece := file.read(min(BLOCK_BYTES, end - 1 - position))):
            count += piece.count(b"\n")
            position += len(piece)
    return count
