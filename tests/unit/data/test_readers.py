"""Files cut into chunks, lines and documents, against plain reading of the whole file."""

import gzip
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.groups.preprocess_config import InputConfig
from megatron_ext.data.readers import expand_inputs, iter_documents, lines, sources
from tests.unit.data.reader_helpers import json_lines, read_all, write


@given(
    content=st.lists(st.sampled_from([b"\n", b"a", b"bc", b"def\n", b"x" * 9, b"y" * 30]), max_size=60).map(
        b"".join
    ),
    chunk_bytes=st.integers(1, 40),
    block=st.integers(1, 16),
    limit=st.sampled_from([5, 12, 1000]),
)
@settings(max_examples=300, deadline=None)
def test_ranges_laid_end_to_end_give_every_line_once(
    content: Any, chunk_bytes: Any, block: Any, limit: Any
) -> None:
    expected = content.split(b"\n")
    expected = expected[:-1] if not expected[-1] else expected
    found, offset = [], 0
    original, lines.BLOCK_BYTES = lines.BLOCK_BYTES, block
    try:
        for start in range(0, len(content), chunk_bytes):
            stream = io.BytesIO(content)
            stream.seek(max(start - 1, 0))
            long_line = b""
            for span in lines.scan_lines(stream.read, start, min(start + chunk_bytes, len(content)), limit):
                if span.data:
                    assert span.offset == offset
                offset += len(span.data)
                if span.kind == lines.LINES:
                    found += span.data.removesuffix(b"\n").split(b"\n")
                    continue
                long_line += span.data
                if span.kind == lines.LONG_END:
                    assert len(long_line) > limit
                    found.append(long_line.removesuffix(b"\n"))
                    long_line = b""
    finally:
        lines.BLOCK_BYTES = original
    assert found == expected
    assert offset == len(content)


@given(content=st.lists(st.sampled_from([b"\n", b"ab", b"c\n"]), max_size=30).map(b"".join), data=st.data())
@settings(max_examples=100, deadline=None)
def test_line_starts_are_counted_as_by_splitting(tmp_path_factory: Any, content: Any, data: Any) -> None:
    path = tmp_path_factory.mktemp("count") / "f"
    path.write_bytes(content)
    end = data.draw(st.integers(0, len(content)))
    start = data.draw(st.integers(0, end))
    starts = [0] + [i + 1 for i, byte in enumerate(content) if byte == 10]
    assert lines.count_line_starts(str(path), start, end) == sum(start <= s < end for s in starts)


@pytest.mark.parametrize("pack", ["plain", "gz", "zst", "stdin"])
def test_all_ways_to_hold_json_lines_give_the_same_documents_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any
) -> None:
    rng = random.Random(5)
    texts = ["".join(rng.choices('abc déf漢🙂\n"', k=rng.randrange(300))) for _ in range(500)]
    rows = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    rows[40] = "{broken"
    rows[300] = "[]"
    content = ("\n".join(rows) + "\n\n").encode()
    offsets = [sum(len(row.encode()) + 1 for row in rows[:i]) for i in (40, 300)]
    monkeypatch.setattr(sources, "STREAM_CHUNK_BYTES", 4096)
    if pack == "gz":  # two members
        cut = len(content) // 2
        path = write(tmp_path / "a.jsonl.gz", gzip.compress(content[:cut]) + gzip.compress(content[cut:]))
    elif pack == "zst":  # two frames
        cut, packer = len(content) // 3, zstandard.ZstdCompressor()
        path = write(
            tmp_path / "a.jsonl.zst", packer.compress(content[:cut]) + packer.compress(content[cut:])
        )
    elif pack == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        path = "-"
    else:
        path = write(tmp_path / "a.jsonl", content)
    documents, rejects = read_all(InputConfig(input=(path,)), chunk_bytes=3000)
    assert [text for (text,) in documents] == [text for i, text in enumerate(texts) if i not in (40, 300)]
    assert [(line, offset) for _, line, offset, _ in rejects] == [(40, offsets[0]), (300, offsets[1])]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_over_the_limit_is_passed_over_without_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 256)
    content = json_lines("one", "x" * 5000, "two", "y" * 90).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    config = InputConfig(input=(path,), max_line_bytes=100)
    for chunk_bytes in (64, 700, 1 << 20):
        documents, rejects = read_all(config, chunk_bytes)
        assert documents == [("one",), ("two",)]
        assert [(line, offset) for _, line, offset, _ in rejects] == [(1, 16), (3, 5045)]
        assert all("--max-line-bytes 100" in reason for *_, reason in rejects)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "malformed JSON"),
        (b'{"other": "a"}', 'missing key "text"'),
        (b'{"text": null}', 'key "text" holds null, not a string'),
        (b'{"text": 3}', 'key "text" holds a number, not a string'),
        (b'{"text": ["a", 3]}', 'key "text" holds a list with a number, not only strings'),
        (b'["text"]', "expected a JSON object, found a list"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud800"}', "unpaired surrogate"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_document_is_rejected_with_its_reason(
    tmp_path: Path, line: Any, reason: Any
) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    documents, rejects = read_all(InputConfig(input=(path,)))
    assert documents == [("before",), ("after",)]
    ((_, number, offset, found),) = rejects
    assert (number, offset) == (1, 19)
    assert reason in found


def test_byte_order_mark_carriage_returns_and_blank_lines_are_no_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \t\n{"text": "b"}')
    assert read_all(InputConfig(input=(path,))) == ([("a",), ("b",)], [])


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1eh"
    raw = json.dumps({"text": text}, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", raw + "\r\n" + json_lines("second"))
    assert read_all(InputConfig(input=(path,)))[0] == [(text,), ("second",)]
    path = write(tmp_path / "a.txt", text + "\n\x0c\nsecond\n")  # a form feed alone is a blank line
    for chunk_bytes in (1, 7, 1 << 20):
        assert read_all(InputConfig(input=(path,)), chunk_bytes)[0] == [(text,), ("second",)]


def test_several_keys_stay_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "1", "b": "2"}\n{"a": "3"}\n{"b": "6", "a": "5"}\n')
    documents, rejects = read_all(InputConfig(input=(path,), json_keys=("a", "b")))
    assert documents == [("1", "2"), ("5", "6")]
    assert [line for _, line, *_ in rejects] == [1]


def test_plain_text_is_a_document_a_line_or_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "first\n\nsecond\r\n third")
    assert read_all(InputConfig(input=(path,)))[0] == [("first",), ("second",), (" third",)]
    copy = write(tmp_path / "b.txt", "first\n\nsecond\r\n third")
    whole = InputConfig(input=(path, copy), text_unit="file")
    assert read_all(whole)[0] == [("first\n\nsecond\r\n third",)] * 2
    assert read_all(InputConfig(input=(path,), text_unit="file", max_line_bytes=5))[1][0][1:3] == (0, 0)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"document {i} é" for i in range(1000)]
    values: list[bytes | None] = [t.encode() for t in texts]
    values[3], values[700] = None, b"bad \xff"
    column = pa.array(values, pa.binary()).view(pa.string())
    table = pa.table({"n": list(range(1000)), "text": column, "title": [str(i) for i in range(1000)]})
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path, row_group_size=300)
    documents, rejects = read_all(InputConfig(input=(path,), json_keys=("title", "text")))
    assert documents == [(str(i), texts[i]) for i in range(1000) if i not in (3, 700)]
    assert [(line, offset) for _, line, offset, _ in rejects] == [(3, None), (700, None)]


def test_inputs_are_files_patterns_and_standard_input(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json.gz", "d.txt.zst"):
        write(tmp_path / name, b"")
    found = expand_inputs(
        InputConfig(input=(f"{tmp_path}/*.jsonl", f"{tmp_path}/c.json.gz", f"{tmp_path}/d*", "-"))
    )
    assert [(s.path.removeprefix(f"{tmp_path}/"), s.format, s.compression) for s in found] == [
        ("a.jsonl", "json", None), ("b.jsonl", "json", None), ("c.json.gz", "json", "gz"),
        ("d.txt.zst", "text", "zst"), ("-", "json", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (lambda d: f"{d}/none.jsonl", ("text",), "no such file"),
        (lambda d: f"{d}/*.none", ("text",), "matches no file"),
        (lambda d: str(d), ("text",), "is a directory"),
        (lambda d: write(d / "a.parquet", b"PAR0"), ("text",), "not a parquet file"),
        (lambda d: write(d / "a.txt", b"a"), ("a", "b"), "plain text, which has no keys"),
    ],
)
def test_inputs_that_cannot_be_read_are_named(tmp_path: Path, make: Any, keys: Any, message: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        expand_inputs(InputConfig(input=(make(tmp_path),), json_keys=keys))


def test_documents_in_one_process_stop_at_the_limit_and_at_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json_lines("a", "b", "c") + "oops\n")
    assert list(iter_documents(InputConfig(input=(path,), max_documents=3))) == [("a",), ("b",), ("c",)]
    with pytest.raises(ValueError, match=r"a\.jsonl: byte 42: malformed JSON"):
        list(iter_documents(InputConfig(input=(path,))))
