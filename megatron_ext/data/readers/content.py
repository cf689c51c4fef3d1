"""Refuses a file whose first bytes show that it is not UTF-8 text, and says what to do.

Without this check, the file's lines would be rejected as malformed or, if the file is ASCII text in UTF-16, read as
text full of zero bytes.
"""

from collections.abc import Callable

HEAD_BYTES = 512
_ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_FORMATS = (
    (b"\x1f\x8b", "gzip data", "its name must end in .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "its name must end in .zst"),
    (b"\xfd7zXZ\0", "xz data", "its name must end in .xz"),
    (b"PAR1\x15", "a parquet file", "its name must end in .parquet"),
    (b"ARROW1\0\0", "an Arrow file", "its name must end in .arrow"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "its name must end in .arrow"),
    (b"PK\x03\x04", "a zip file", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z file", "unpack it"),
    (b"%PDF-", "a PDF", "extract its text"),
)


def check_is_text(read: Callable[[int], bytes], path: str) -> bytes:
    """Reads the beginning of a file, checks that it is UTF-8 text, and returns it.

    Raises:
        ValueError: the file is not UTF-8 text; the message says what it is and what to do.
    """
    head = b""
    while len(head) < HEAD_BYTES and (piece := read(HEAD_BYTES - len(head))):
        head += piece
    for mark, encoding in _ENCODINGS:
        if head.startswith(mark):
            raise _wrong_encoding(path, encoding)
    for mark, name, remedy in _FORMATS:
        if head.startswith(mark):
            raise ValueError(f"--input {path}: is {name}, not UTF-8 text; {remedy}")
    if head[:3] == b"BZh" and head[4:10] == b"1AY&SY":
        raise ValueError(f"--input {path}: is bzip2 data, not UTF-8 text; its name must end in .bz2")
    if head[257:262] == b"ustar":
        raise ValueError(f"--input {path}: is a tar archive, not UTF-8 text; unpack it")
    for start, byte_order in ((0, "BE"), (1, "LE")):  # ASCII in UTF-16: every other byte is zero
        zeros, others = head[start::2], head[1 - start :: 2]
        if len(head) >= 4 and not any(zeros) and all(others):
            raise _wrong_encoding(path, f"UTF-16{byte_order}")
    return head


def _wrong_encoding(path: str, encoding: str) -> ValueError:
    return ValueError(f"--input {path}: is {encoding}, not UTF-8; convert it (iconv -f {encoding} -t UTF-8)")
