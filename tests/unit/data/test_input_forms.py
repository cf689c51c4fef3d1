"""Packed files, files of columns, files that are no text, and one file under two names."""

import bz2
import gzip
import io
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_ext.config.groups.preprocess_config import InputConfig
from megatron_ext.data.readers import expand_inputs, iter_documents
from tests.unit.data.reader_helpers import json_lines, read_all, write

PACK = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("damage", ["cut", "garbage", "garbage behind"])
def test_packed_files_that_are_damaged_are_an_error(tmp_path: Path, pack: Any, damage: Any) -> None:
    packed = PACK[pack](json_lines(*map(str, range(5000))).encode())
    broken = {
        "cut": packed[: len(packed) // 2],
        "garbage": b"garbage" * 9,
        "garbage behind": packed + b"garbage!",
    }
    path = write(tmp_path / f"a.jsonl.{pack}", broken[damage])
    with pytest.raises(ValueError, match=f"a.jsonl.{pack}: (is not|the (zstd|bzip2|xz) data is truncated)"):
        read_all(InputConfig(input=(path,)))


def packed_zstd(content: bytes, window_log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()  # a stream, so that the frame states its whole window


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window_is_read_behind_a_skippable_frame_too(
    tmp_path: Path, window_log: int
) -> None:
    packed = packed_zstd(json_lines("a", "b").encode(), window_log)
    assert zstandard.get_frame_parameters(packed).window_size == 1 << window_log
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    path = write(tmp_path / "a.jsonl.zst", skippable + packed + skippable + packed)
    assert read_all(InputConfig(input=(path,))) == ([("a",), ("b",)] * 2, [])


def test_zstd_that_cannot_be_unpacked_says_why(tmp_path: Path) -> None:
    too_large = b"\x28\xb5\x2f\xfd\x00\xf8\x01\x00\x00"  # a window of 41 bits
    path = write(tmp_path / "a.jsonl.zst", too_large)
    with pytest.raises(ValueError, match=r"window is above the limit of 2 GiB of memory; compress it again"):
        read_all(InputConfig(input=(path,)))
    samples = [json_lines(f"document number {i}").encode() for i in range(2000)]
    dictionary = zstandard.train_dictionary(4096, samples)
    write(tmp_path / "a.jsonl.zst", zstandard.ZstdCompressor(dict_data=dictionary).compress(samples[0]))
    with pytest.raises(ValueError, match=r"a.jsonl.zst: is compressed with a zstd dictionary"):
        read_all(InputConfig(input=(path,)))


def _gzip(content: bytes) -> bytes:
    return gzip.compress(
        content, mtime=0
    )  # without a time, so that the tests are named the same in every worker


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", _gzip(b"a"), "is gzip data, not UTF-8 text; its name must end in .gz"),
        ("a.txt", zstandard.ZstdCompressor().compress(b"a"), "is zstd data"),
        ("a.json", bz2.compress(b"a"), "is bzip2 data"),
        ("a.jsonl", lzma.compress(b"a"), "is xz data"),
        ("a.jsonl.gz", _gzip(_gzip(b"a")), "is gzip data"),
        ("a.txt", "text\n".encode("utf-16"), r"is UTF-16, not UTF-8; convert it \(iconv"),
        ("a.txt", "text\n".encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
        ("a.jsonl", json_lines("漢").encode("utf-16-be"), "is UTF-16BE, not UTF-8"),
        ("a.txt.xz", lzma.compress("é".encode("utf-32")), "is UTF-32, not UTF-8"),
        ("a.zip", b"PK\x03\x04\x14\0", "is a zip file"),
        ("a.tar.gz", _gzip(b"name".ljust(257, b"\0") + b"ustar"), "is a tar archive"),
    ],
)  # fmt: skip
def test_what_is_not_utf8_text_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message):
        expand_inputs(InputConfig(input=(path,)))
    if Path(name).suffix in (".txt", ".json", ".jsonl"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(ValueError, match=message):
            read_all(InputConfig(input=("-",)))


def test_names_in_capitals_mean_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "A.TXT.GZ", gzip.compress(b"one\ntwo\n"))
    assert read_all(InputConfig(input=(path,)))[0] == [("one",), ("two",)]


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}]', '[\n{"text": "a"}\n]', "Plain text.\n", '{\n"text": "a"\n}']
)
def test_a_file_that_is_no_json_lines_at_all_gets_a_hint(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.md", content)
    with pytest.raises(
        ValueError, match=r"JSON lines hold one object per line; .* name the file .txt or give --text-unit"
    ):
        list(iter_documents(InputConfig(input=(path,))))


def test_an_explicit_text_unit_makes_every_file_without_a_name_of_its_own_plain_text(tmp_path: Path) -> None:
    paths = (
        write(tmp_path / "a.md", b"# One\n\ntwo\n"),
        write(tmp_path / "LICENSE", b"free\n"),
        write(tmp_path / "b.json", json_lines("three")),
    )
    packed = write(tmp_path / "c.rst.gz", _gzip(b"four\n"))
    packed_json = write(tmp_path / "d.jsonl.gz", _gzip(json_lines("five").encode()))
    whole = read_all(InputConfig(input=(*paths, packed_json), text_unit="file"))[0]
    assert whole == [("# One\n\ntwo\n",), ("free\n",), ("three",), ("five",)]
    lines = read_all(InputConfig(input=(*paths, packed), text_unit="line"))[0]
    assert lines == [("# One",), ("two",), ("free",), ("three",), ("four",)]
    with pytest.raises(
        ValueError, match=r"--text-unit file: .*c.rst.gz must be neither compressed nor a pipe"
    ):
        read_all(InputConfig(input=(packed,), text_unit="file"))


def test_the_same_file_under_two_names_is_refused_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", json_lines("a"))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to("a.jsonl")
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes())
    for inputs, message in (
        (("a.jsonl", "a.jsonl"), "a.jsonl and a.jsonl are"),
        (("a.jsonl", "./a.jsonl"), "a.jsonl and ./a.jsonl are"),
        (("a.jsonl", "a*"), r"a.jsonl and a.jsonl \(of a\*\) are"),
        (("a.jsonl", "link.jsonl"), "a.jsonl and link.jsonl are"),
        (("hard.jsonl", f"{tmp_path}/a.jsonl"), "hard.jsonl and .*/a.jsonl are"),
    ):
        with pytest.raises(ValueError, match=f"--input: {message} the same file; give it once"):
            expand_inputs(InputConfig(input=inputs))
    assert read_all(InputConfig(input=("a.jsonl", "copy.jsonl")))[0] == [("a",), ("a",)]


def text_columns() -> dict[str, Any]:
    import pyarrow as pa

    plain = pa.array(["one", "zwöl", None, "漢"])
    kinds = [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
    ]
    columns = {str(kind): plain.cast(kind) for kind in kinds}
    columns["dictionary"] = plain.dictionary_encode()
    columns["dictionary of binary"] = plain.cast(pa.binary()).dictionary_encode()
    columns["json"] = pa.ExtensionArray.from_storage(pa.json_(), plain)
    columns["fixed size"] = pa.array([b"one", b"two", None, "漢".encode()], pa.binary(3))
    return columns


@pytest.mark.parametrize("name", text_columns())
@pytest.mark.parametrize("file", ["a.parquet", "a.arrow", "stream.arrow", "a.feather"])
def test_every_form_of_text_column_is_read(tmp_path: Path, name: str, file: str) -> None:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq

    column = text_columns()[name]
    expected = [None if v is None else v.decode() if isinstance(v, bytes) else v for v in column.to_pylist()]
    table = pa.table({"n": [1, 2, 3, 4], "text": column, "nested": [{"text": ["other"]}] * 4})
    path = str(tmp_path / file)
    if file == "a.parquet":
        pq.write_table(table, path, row_group_size=3)
    elif file == "a.feather":
        pyarrow.feather.write_feather(table, path, chunksize=3)
    else:
        make = pa.ipc.new_stream if file == "stream.arrow" else pa.ipc.new_file
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    documents, rejects = read_all(InputConfig(input=(path,)))
    assert documents == [(text,) for text in expected if text is not None]
    assert [(line, reason) for _, line, _, reason in rejects] == [
        (2, 'column "text" holds null, not a string')
    ]


def test_columns_that_hold_no_text_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"list": [["a"]], "struct": [{"text": "a"}], "number": [1], "null": pa.array([None])})
    texts = pa.table({"text": [f"some text {i}" for i in range(5000)]})
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path)
    for key in table.column_names:
        with pytest.raises(ValueError, match=f"--json-keys {key}: the column in .* holds .*, not strings"):
            expand_inputs(InputConfig(input=(path,), json_keys=(key,)))
    pq.write_table(texts, path, compression="snappy")
    content = bytearray(Path(path).read_bytes())
    content[300:400] = b"\xff" * 100
    write(tmp_path / "a.parquet", bytes(content))
    with pytest.raises(ValueError, match="a.parquet: row group 0 cannot be read"):
        read_all(InputConfig(input=(path,)))
    stream = str(tmp_path / "a.arrow")
    with pa.ipc.new_stream(stream, texts.schema) as writer:
        writer.write_table(texts)
    write(tmp_path / "a.arrow", Path(stream).read_bytes()[:-60])
    with pytest.raises(ValueError, match="a.arrow: cannot be read"):
        read_all(InputConfig(input=(stream,)))
