"""Decompresses .gz, .zst, .bz2 and .xz files as streams; a truncated file is an error.

A file may hold several compressed pieces one after the other (gzip members, zstd frames, bzip2 and xz streams); they
are read as one text. For zstd, bzip2 and xz, the libraries' own file readers are not used: they accept a truncated file
as complete, or ignore what follows the first piece.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

from megatron_ext.data.files.optional_packages import import_optional

Compression = Literal["gz", "zst", "bz2", "xz"]
SUFFIXES: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
"""Maps a file name suffix to the compression of such a file."""

MAX_ZSTD_WINDOW = 1 << 31
"""Largest window, in bytes, that a zstd frame may need (`zstd --long=31`); the window is kept in memory."""

_PACKED_BYTES = 16 << 10


def open_packed(file: BinaryIO, path: str, compression: Compression) -> Callable[[int], bytes]:
    """Returns a function `read(n)` that returns about `n` decompressed bytes of a file.

    Raises (from `read`):
        ValueError: the data is in another format, is truncated, or needs more memory than allowed.
    """
    if compression == "gz":
        return _open_gzip(file, path)
    if compression == "bz2":
        return _open_pieces(file, path, "bzip2", bz2.BZ2Decompressor, (OSError, ValueError))
    if compression == "xz":
        return _open_pieces(file, path, "xz", lzma.LZMADecompressor, (lzma.LZMAError,), padding=b"\0")
    zstandard = import_optional("zstandard", f"--input {path}")
    unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    return _open_pieces(file, path, "zstd", unpacker.decompressobj, (zstandard.ZstdError,))


def _open_gzip(file: BinaryIO, path: str) -> Callable[[int], bytes]:
    unpacked = gzip.GzipFile(fileobj=file)

    def read(size: int) -> bytes:
        try:
            return unpacked.read(size)
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path}: is not gzip data or is truncated ({error})") from None

    return read


def _open_pieces(
    file: BinaryIO,
    path: str,
    kind: str,
    new_piece: Callable[[], Any],
    errors: tuple[type[Exception], ...],
    padding: bytes = b"",
) -> Callable[[int], bytes]:
    """Returns a function that decompresses consecutive pieces and reads them as one text.

    `new_piece` makes an object with `decompress`, `eof` and `unused_data`; the bytes `padding` may occur between
    pieces.
    """
    piece = new_piece()
    rest, started = b"", False

    def read(size: int) -> bytes:
        nonlocal piece, rest, started
        out = b""
        while len(out) < min(size, _PACKED_BYTES):
            packed = rest or file.read(_PACKED_BYTES)
            rest = b""
            if not packed:
                if started:
                    raise ValueError(f"{path}: the {kind} data is truncated")
                break
            if padding and not started and not (packed := packed.lstrip(padding)):
                continue
            started = True
            try:
                out += piece.decompress(packed)
            except errors as error:
                raise ValueError(f"{path}: {_reason(kind, error)}") from None
            if piece.eof:
                rest, started = piece.unused_data, False
                piece = new_piece()
        return out

    return read


def _reason(kind: str, error: Exception) -> str:
    """Turns the error of a compression library into a message for the user."""
    text = str(error)
    if "too much memory" in text:
        return (
            f"its zstd window is above the limit of {MAX_ZSTD_WINDOW >> 30} GiB of memory; "
            f"compress it again with a smaller one (zstd --long=31 or less)"
        )
    if "allocation" in text.lower():
        return f"not enough memory to decompress it; its zstd window is up to {MAX_ZSTD_WINDOW >> 30} GiB ({text})"
    if "ictionary" in text:
        return f"is compressed with a zstd dictionary, which is not supported; compress it again without one ({text})"
    return f"is not {kind} data ({text})"
