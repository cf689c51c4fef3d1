"""Documents in columns: .parquet, and Arrow's own files (.arrow, .feather), a document a row.

A parquet file is cut into its row groups, an Arrow file (random access or stream, as `datasets` writes it) into its
record batches. A column of text may be stored in any of Arrow's forms of string and binary, and as a dictionary.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from megatron_ext.data.files.optional_packages import import_optional

Format = Literal["parquet", "arrow"]

FORMATS: dict[str, Format] = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}
"""How a file's name says that it holds columns."""

UNITS = {"parquet": "row group", "arrow": "record batch"}
"""What a file of each format is cut into."""

_ROWS = 256


def check_columns(path: str, file_format: str, keys: tuple[str, ...]) -> None:
    """Raises `ValueError` where the file cannot be read or lacks a text column."""
    import_optional("pyarrow", f"--input {path}")
    kind = "a parquet" if file_format == "parquet" else "an Arrow"
    with _told(f"--input {path}: not {kind} file"), _open(path, file_format) as file:
        schema = file.schema_arrow if file_format == "parquet" else file.schema
    for key in keys:
        if schema.names.count(key) != 1:
            how = "several columns of that name" if key in schema.names else "the columns"
            raise ValueError(f"--json-keys {key}: {path} has {how}: {', '.join(schema.names)}")
        if not _is_text(schema.field(key).type):
            raise ValueError(
                f"--json-keys {key}: in {path} that column holds {schema.field(key).type}, not strings"
            )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    kind = getattr(kind, "storage_type", kind)  # an extension type, such as JSON
    forms = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(types, f"is_{form}")(kind) for form in (*forms, "fixed_size_binary"))


@contextlib.contextmanager
def _told(message: str) -> Iterator[None]:
    """Makes one line of what pyarrow says of a damaged file; errors of the system pass."""
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
    """A parquet file, an Arrow file (has `num_record_batches`) or an Arrow stream."""
    import pyarrow.ipc
    import pyarrow.parquet

    if file_format == "parquet":
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
        return
    with open(path, "rb") as head:
        is_stream = head.read(6) != b"ARROW1"
    with pyarrow.memory_map(path) as mapped:
        # No threads: the parent shall be able to fork its workers, each of which is one core.
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        open_ipc = pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file
        yield open_ipc(mapped, options=options)


def row_counts(path: str, file_format: str) -> Iterator[int]:
    """Yields the number of rows of each row group or record batch."""
    with _told(f"{path}: cannot be read"), _open(path, file_format) as file:
        if file_format == "parquet":
            yield from (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
        else:
            yield from (batch.num_rows for batch in _record_batches(file, 0))


def _record_batches(file: Any, first: int) -> Iterator[Any]:
    """Record batches from number `first` on; those of a memory-mapped file cost nothing until they are looked at."""
    if hasattr(file, "num_record_batches"):
        yield from (file.get_batch(number) for number in range(first, file.num_record_batches))
        return
    for number, batch in enumerate(file):
        if number >= first:
            yield batch


def read_rows(
    path: str, file_format: str, part: int, keys: tuple[str, ...]
) -> Iterator[tuple[int, list[list[bytes | None]]]]:
    """Yields (bytes, columns) of some rows of a row group or record batch; a column's values are bytes, None for null.

    They are bytes because a string column may hold invalid UTF-8, which must cost its own row alone.

    Raises:
        ValueError: a part of the file cannot be read.
    """
    import pyarrow

    with _told(f"{path}: {UNITS[file_format]} {part} cannot be read"), _open(path, file_format) as file:
        if file_format == "parquet":
            rows = file.iter_batches(_ROWS, row_groups=[part], columns=list(keys), use_threads=False)
        else:
            batch = next(_record_batches(file, part)).select(list(keys))
            rows = (batch.slice(start, _ROWS) for start in range(0, batch.num_rows, _ROWS))
        for some in rows:
            yield some.nbytes, [some.column(key).cast(pyarrow.large_binary()).to_pylist() for key in keys]
