"""Shards, their assembly and publication, against mcore's builder and readers, in this process."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_ext.config.groups.preprocess_config import InputConfig, PreprocessConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.indexed.manifest import read_manifest
from megatron_ext.data.preprocess import assembly as assembly_module
from megatron_ext.data.preprocess.assembly import Assembly
from megatron_ext.data.preprocess.encoding import Encoder
from megatron_ext.data.preprocess.preprocess import Preprocessor
from megatron_ext.data.preprocess.shards import (
    RejectedLine,
    ShardOptions,
    encode_chunk,
    read_finished_shard,
    shard_path,
)
from megatron_ext.data.preprocess.work_directory import WorkDirectory, hold_as_worker
from megatron_ext.data.readers import expand_inputs, plan_chunks
from megatron_ext.data.tokenizers import build_tokenizer

BYTES = TokenizerConfig(tokenizer_type="ByteLevelTokenizer")


def options(
    directory: Any,
    *,
    keys: Any = ("text",),
    eod: Any = None,
    skip_empty: Any = False,
    on_error: Any = "fail",
    tokenizer: Any = BYTES,
    limit: Any = 1 << 20,
) -> Any:
    built = build_tokenizer(tokenizer)
    return ShardOptions(
        bos=None,
        directory=str(directory),
        keys=keys,
        dtype=DType.optimal_dtype(built.vocab_size).__name__,
        vocab_size=built.vocab_size,
        eod=built.eod if eod else None,
        on_error=on_error,
        skip_empty=skip_empty,
        max_line_bytes=limit,
    )


def assemble(
    directory: Any,
    path: Any,
    opts: Any,
    *,
    chunk_bytes: Any = 1 << 20,
    partitions: Any = 1,
    tokenizer: Any = BYTES,
    restart_at: Any = (),
) -> Any:
    """Runs the whole of a preprocessing in this process; returns `(bin, idx)` for each key and the assembly."""
    config = InputConfig(input=(str(path),), json_keys=opts.keys, max_line_bytes=opts.max_line_bytes)
    encoder = Encoder(build_tokenizer(tokenizer), "reference")
    sources = expand_inputs(config)
    work = Assembly(directory, len(opts.keys), partitions, sources)
    for index, chunk in enumerate(plan_chunks(sources, chunk_bytes, config.max_line_bytes)):
        if index in restart_at:  # as after a kill: files may be longer than the state says
            for file in directory.glob("out-*"):
                with open(file, "ab") as out:
                    out.write(b"partial")
            work = Assembly(directory, len(opts.keys), partitions, sources)
        work.append(encode_chunk(opts, index, chunk, encoder), chunk.source_index)
    files = [(Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) for prefix in work.finish(opts.dtype)]
    return files, work


def mcore_files(directory: Any, documents: Any, tokenizer: Any, eod: Any) -> Any:
    """Writes documents as Megatron-LM's tool does: ids, the end-of-document id where there is one, add_document."""
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(directory / "ref.bin"), dtype=dtype)
    for text in documents:
        ids = tokenizer.tokenize(text)
        if ids and eod:
            ids.append(tokenizer.eod)
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(directory / "ref.idx"))
    return directory / "ref.bin", directory / "ref.idx"


def write_json_lines(path: Any, texts: Any, **more: Any) -> Any:
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


@given(
    texts=st.lists(st.one_of(st.just(""), st.text(st.characters(codec="utf-8"), max_size=30)), max_size=25),
    chunk_bytes=st.integers(20, 300),
    partitions=st.integers(1, 4),
    eod=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_documents_in_any_layout_give_mcores_bytes(
    tmp_path_factory: Any, texts: Any, chunk_bytes: Any, partitions: Any, eod: Any, data: Any
) -> None:
    tmp_path = tmp_path_factory.mktemp("run")
    path = write_json_lines(tmp_path / "in.jsonl", texts)
    restarts = data.draw(st.sets(st.integers(0, 10), max_size=2))
    work = tmp_path / "work"
    work.mkdir()
    files, _ = assemble(work, path, options(work, eod=eod), chunk_bytes=chunk_bytes, partitions=partitions,
                        restart_at=restarts)  # fmt: skip
    dealt = [text for part in range(partitions) for text in texts[part::partitions]]
    expected = mcore_files(tmp_path, dealt, build_tokenizer(BYTES), eod)
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in expected]


@pytest.mark.parametrize("mmap", [True, False])
def test_mcores_readers_see_the_documents(tmp_path: Path, mmap: Any) -> None:
    texts = ["first document", "", "third", "", "é漢🙂"]
    path = write_json_lines(tmp_path / "in.jsonl", texts)
    ((tokens, index),), _ = assemble(tmp_path, path, options(tmp_path, eod=True), chunk_bytes=10)
    tokens.rename(tmp_path / "d.bin")
    index.rename(tmp_path / "d.idx")
    dataset = IndexedDataset(str(tmp_path / "d"), mmap=mmap)
    assert dataset.index.dtype == np.uint16
    assert dataset.document_indices.tolist() == [0, 1, 1, 2, 2, 3]
    assert [list(dataset[i]) for i in range(len(dataset))] == [[*t.encode(), 256] for t in texts if t]


def test_zero_documents_make_a_dataset_that_mcore_opens(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", [])
    ((tokens, index),), _ = assemble(tmp_path, path, options(tmp_path))
    expected = mcore_files(tmp_path, [], build_tokenizer(BYTES), False)
    assert (tokens.read_bytes(), index.read_bytes()) == (expected[0].read_bytes(), expected[1].read_bytes())
    dataset = IndexedDataset(str(tmp_path / "ref"), mmap=False)
    assert len(dataset) == 0


@pytest.mark.parametrize(("ids", "dtype"), [(65_498, "uint16"), (65_499, "int32")])
def test_token_type_changes_at_65500_ids(tmp_path: Path, ids: Any, dtype: Any) -> None:
    tokenizer = TokenizerConfig(
        tokenizer_type="NullTokenizer", vocab_size=ids
    )  # and one for the end of a document
    texts = [f"0 {ids - 1} 7", "", f"{ids}"]
    path = write_json_lines(tmp_path / "in.jsonl", texts)
    opts = options(tmp_path, tokenizer=tokenizer, eod=True)
    assert opts.dtype == dtype
    files, _ = assemble(tmp_path, path, opts, tokenizer=tokenizer)
    expected = mcore_files(tmp_path, texts, build_tokenizer(tokenizer), True)
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in expected]


def test_skipped_empty_documents_leave_the_keys_aligned(tmp_path: Path) -> None:
    rows = [("a", ""), ("", ""), ("", "b"), ("c", "d")]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"x": x, "y": y}) + "\n" for x, y in rows))
    files, work = assemble(tmp_path, path, options(tmp_path, keys=("x", "y"), skip_empty=True))
    assert work.state.totals.skipped_empty == 1
    for (_, index), column in zip(files, zip(*[row for row in rows if any(row)], strict=True), strict=True):
        reference = mcore_files(tmp_path, column, build_tokenizer(BYTES), False)
        assert index.read_bytes() == reference[1].read_bytes()


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz"])
def test_quarantine_keeps_lines_as_they_were_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    import gzip

    from megatron_ext.data.readers import lines, sources

    monkeypatch.setattr(lines, "BLOCK_BYTES", 128)
    monkeypatch.setattr(sources, "STREAM_CHUNK_BYTES", 300)
    good = [json.dumps({"text": f"good {i}"}).encode() for i in range(60)]
    bad = {7: b"{oops", 20: b'{"text": "\xff"}', 33: b'{"text": "' + b"x" * 3000 + b'"}', 58: b"[1]"}
    rows = [bad.get(i, row) for i, row in enumerate(good)]
    content = b"\n".join(rows) + b"\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    work = tmp_path / "work"
    work.mkdir()
    config = PreprocessConfig(output_prefix=str(tmp_path / "out"), on_error="quarantine", workers=1)
    inputs = InputConfig(input=(str(path),), max_line_bytes=1000)
    summary = Preprocessor(inputs, BYTES, config).run()
    assert (summary.totals.documents, summary.totals.rejected) == (56, 4)
    assert Path(f"{config.output_prefix}_quarantined.jsonl").read_bytes() == b"".join(
        row + b"\n" for row in bad.values()
    )
    report = list(map(json.loads, Path(f"{config.output_prefix}_rejected.jsonl").read_text().splitlines()))
    assert [(r["file"], r["line"]) for r in report] == [(str(path), i + 1) for i in bad]
    for record, row in zip(report, bad.values(), strict=True):
        assert content[record["byte_offset"] :].startswith(row)
    reference = mcore_files(
        tmp_path, [f"good {i}" for i in range(60) if i not in bad], build_tokenizer(BYTES), False
    )
    assert Path(f"{summary.prefixes[0]}.bin").read_bytes() == reference[0].read_bytes()


def test_a_shard_that_was_damaged_does_not_count_as_finished(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "in.jsonl", ["some text"])
    config = InputConfig(input=(str(path),))
    chunk = next(iter(plan_chunks(expand_inputs(config), 1 << 20, 1 << 20)))
    encode_chunk(options(tmp_path), 3, chunk, Encoder(build_tokenizer(BYTES), "reference"))
    assert read_finished_shard(str(tmp_path), 3, check=True) is not None
    file = shard_path(str(tmp_path), 3, "0.bin")
    file.write_bytes(bytes(file.stat().st_size))
    assert read_finished_shard(str(tmp_path), 3, check=True) is None
    assert read_finished_shard(str(tmp_path), 4, check=True) is None


def test_a_rejected_line_leaves_no_finished_shard(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(RejectedLine):
        assemble(tmp_path, path, options(tmp_path))
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("stop", range(1, 5))
def test_publication_goes_on_after_a_kill_at_any_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    """What stands at the final names is never an index without the tokens it belongs to."""
    prefix = str(tmp_path / "out")
    for suffix in ("a.bin", "a.idx", "b.bin", "b.idx"):
        (tmp_path / f"out_{suffix}").write_text("old")
    plan = {"x": 1}
    work = WorkDirectory(prefix, plan, resume=False)
    moves = []
    for suffix in ("a.bin", "b.bin", "a.idx", "b.idx"):
        (work.path / suffix).write_text("new")
        moves.append((work.path / suffix, f"{prefix}_{suffix}"))
    work.prepare(moves, [f"{prefix}_a.idx", f"{prefix}_b.idx"])

    class Killed(BaseException):
        pass

    replace, calls = os.replace, []

    def counting(*args: Any) -> None:
        calls.append(args)
        if len(calls) == stop:
            raise Killed
        replace(*args)

    monkeypatch.setattr("megatron_ext.data.preprocess.work_directory.os.replace", counting)
    with pytest.raises(Killed):
        work.publish()
    monkeypatch.undo()
    for dataset in "ab":
        index = tmp_path / f"out_{dataset}.idx"
        assert (
            not index.exists() or index.read_text() == (tmp_path / f"out_{dataset}.bin").read_text() == "new"
        )
    work.release()
    again = WorkDirectory(prefix, plan, resume=True)
    assert again.is_publishing
    again.publish()
    again.remove()
    assert {file.read_text() for file in tmp_path.glob("out_*")} == {"new"}
    assert not again.path.exists()


def test_a_resumed_run_with_another_plan_is_refused(tmp_path: Path) -> None:
    WorkDirectory(str(tmp_path / "out"), {"--append-eod": True}, resume=False).release()
    with pytest.raises(ValueError, match="--append-eod is False, but was True"):
        WorkDirectory(str(tmp_path / "out"), {"--append-eod": False}, resume=True)


def test_two_runs_cannot_write_one_prefix(tmp_path: Path) -> None:
    first = WorkDirectory(str(tmp_path / "out"), {}, resume=False)
    with pytest.raises(ValueError, match="another run is writing these datasets"):
        WorkDirectory(str(tmp_path / "out"), {}, resume=False)
    first.remove()


def test_a_run_waits_for_workers_of_a_killed_one(tmp_path: Path) -> None:
    first = WorkDirectory(str(tmp_path / "out"), {}, resume=False)
    orphan = hold_as_worker(str(first.path))
    first.release()  # as when its process is killed
    threading.Timer(0.5, orphan.close).start()
    begin = time.monotonic()
    WorkDirectory(str(tmp_path / "out"), {}, resume=True).remove()
    assert time.monotonic() - begin > 0.4
    assert not first.path.exists()


def test_copying_falls_back_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "from").write_bytes(content)

    def unsupported(*args: Any) -> None:
        raise OSError(assembly_module.errno.EXDEV, "across file systems")  # type: ignore[attr-defined]

    for replacement in (None, unsupported):
        if replacement is not None:
            monkeypatch.setattr(assembly_module.os, "copy_file_range", replacement)  # type: ignore[attr-defined]
        with open(tmp_path / "from", "rb") as source, open(tmp_path / "to", "wb") as target:
            target.write(b"before")
            assembly_module.copy_bytes(source, target)
            assert target.seek(0, 2) == len(content) + 6
        assert (tmp_path / "to").read_bytes() == b"before" + content


def test_every_index_is_published_after_the_tokens_and_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json_lines(tmp_path / "\udce4.jsonl", ["some text"], title="t")  # a name that is not UTF-8
    published = []
    replace = os.replace

    def recorded(source: Any, target: Any) -> None:
        published.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr("megatron_ext.data.preprocess.work_directory.os.replace", recorded)
    config = PreprocessConfig(output_prefix=str(tmp_path / "out"), workers=1)
    summary = Preprocessor(InputConfig(input=(str(path),), json_keys=("text", "title")), BYTES, config).run()
    names = [name for name in published if name.startswith("out_")]
    keys = ("text", "title")
    assert names == [f"out_{key}_document.{suffix}" for suffix in ("bin", "json", "idx") for key in keys]
    manifest = read_manifest(summary.prefixes[0])
    assert manifest is not None
    assert manifest["inputs"][0]["path"] == str(path)
