"""Unpacking of .gz and .zst, in pieces, with an error for a file that ends too early."""

import gzip
import zlib
from collections.abc import Callable
from typing import BinaryIO

from megatron_ext.data.optional import import_optional

_PACKED_BYTES = 16 << 10


def open_gzip(file: BinaryIO, path: str) -> Callable[[int], bytes]:
    """Returns `read(n)` of the unpacked bytes of a gzip file, of one or several members.

    Raises (from `read`):
        ValueError: not gzip data, or cut short.
    """
    unpacked = gzip.GzipFile(fileobj=file)

    def read(size: int) -> bytes:
        try:
            return unpacked.read(size)
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path}: not gzip data, or cut short ({error})") from None

    return read


def open_zstd(file: BinaryIO, path: str) -> Callable[[int], bytes]:
    """Returns `read(n)` of the unpacked bytes of a zstd file, of one or several frames; `n` is only a hint.

    The library's stream reader takes a file that was cut short for a complete one, so frames are followed here.

    Raises (from `read`):
        ValueError: not zstd data, or cut short.
    """
    zstandard = import_optional("zstandard", f"--input {path}")

    unpacker = zstandard.ZstdDecompressor()
    frame = unpacker.decompressobj()
    rest, started = b"", False

    def read(size: int) -> bytes:
        nonlocal frame, rest, started
        out = b""
        while len(out) < min(size, _PACKED_BYTES):
            packed = rest or file.read(_PACKED_BYTES)
            rest = b""
            if not packed:
                if started:
                    raise ValueError(f"{path}: zstd data cut short")
                break
            started = True
            try:
                out += frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise ValueError(f"{path}: not zstd data ({error})") from None
            if frame.eof:
                rest, started = frame.unused_data, False
                frame = unpacker.decompressobj()
        return out

    return read
