"""Reads documents from the columns of .parquet and Arrow files (.arrow, .feather), one document per row.

A chunk is one row group of a parquet file, or one record batch of an Arrow file (in the random-access format, or in the
stream format that `datasets` writes). A text column may have any of Arrow's string and binary types, or a
dictionary-encoded form of one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from megatron_ext.data.files.optional_packages import import_optional

Format = Literal["parquet", "arrow"]

FORMATS: dict[str, Format] = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
"""Maps a file name suffix to the format of such a file, for formats that have columns."""

UNITS = {"parquet": "row group", "arrow": "record batch"}
"""Maps a format to the name of the part of a file that becomes one chunk."""

_ROWS = 256


def check_columns(path: str, file_format: str, keys: tuple[str, ...]) -> None:
    """Raises `ValueError` if the file cannot be read, or if a key does not name a column of text."""
    import_optional("pyarrow", f"--input {path}")
    kind = "a parquet" if file_format == "parquet" else "an Arrow"
    with _in_one_line(f"--input {path}: not {kind} file"), _open(path, file_format) as file:
        schema = file.schema_arrow if file_format == "parquet" else file.schema
    for key in keys:
        if schema.names.count(key) != 1:
            how = "several columns of that name" if key in schema.names else "no column of that name, only"
            raise ValueError(f"--json-keys {key}: {path} has {how}: {', '.join(schema.names)}")
        if not _is_text(schema.field(key).type):
            raise ValueError(
                f"--json-keys {key}: the column in {path} holds {schema.field(key).type}, not strings"
            )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    kind = getattr(kind, "storage_type", kind)  # an extension type, such as JSON
    forms = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(types, f"is_{form}")(kind) for form in (*forms, "fixed_size_binary"))


@contextlib.contextmanager
def _in_one_line(message: str) -> Iterator[None]:
    """Turns pyarrow's error about a damaged file into a one-line `ValueError`; passes on operating system errors."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{message} ({first_line})") from None


@contextlib.contextmanager
def _open(path: str, file_format: str) -> Iterator[Any]:
    """Opens a parquet file, an Arrow file (whose reader has `num_record_batches`) or an Arrow stream."""
    import pyarrow.ipc
    import pyarrow.parquet

    if file_format == "parquet":
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
        return
    with open(path, "rb") as head:
        is_stream = head.read(6) != b"ARROW1"
    with pyarrow.memory_map(path) as mapped:
        # No threads: only a process with a single thread can fork its workers, and each worker uses one core.
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        open_ipc = pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file
        yield open_ipc(mapped, options=options)


def row_counts(path: str, file_format: str) -> Iterator[int]:
    """Yields the number of rows of each row group or record batch."""
    with _in_one_line(f"{path}: cannot be read"), _open(path, file_format) as file:
        if file_format == "parquet":
            yield from (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        else:
            yield from (batch.num_rows for batch in _record_batches(file, 0))


def _record_batches(file: Any, first: int) -> Iterator[Any]:
    """Yields record batches from number `first` on; the file is memory-mapped, so unused batches cost nothing."""
    if hasattr(file, "num_record_batches"):
        yield from (file.get_batch(number) for number in range(first, file.num_record_batches))
        return
    for number, batch in enumerate(file):
        if number >= first:
            yield batch


def read_rows(
    path: str, file_format: str, part: int, keys: tuple[str, ...]
) -> Iterator[tuple[int, list[list[bytes | None]]]]:
    """Yields the rows of a row group or record batch in pieces: (size in bytes, one list of values for each column).

    Values are bytes, or None for null. They are not decoded here because a column may hold invalid UTF-8, for which
    only the affected row must be rejected.

    Raises:
        ValueError: the row group or record batch cannot be read.
    """
    import pyarrow

    with (
        _in_one_line(f"{path}: {UNITS[file_format]} {part} cannot be read"),
        _open(path, file_format) as file,
    ):
        if file_format == "parquet":
            rows = file.iter_batches(_ROWS, row_groups=[part], columns=list(keys), use_threads=False)
        else:
            batch = next(_record_batches(file, part)).select(list(keys))
            rows = (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))
        for some in rows:
            yield some.nbytes, [some.column(key).cast(pyarrow.large_binary()).to_pylist() for key in keys]
