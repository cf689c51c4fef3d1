"""Merging, cutting and shuffling, against lists of documents that mcore reads."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data.corpora import dataset_rewrite as rewrite
from megatron_ext.data.corpora.dataset_rewrite import (
    DatasetWriter,
    length_histogram,
    merge,
    permuted,
    shuffle,
    split,
)
from megatron_ext.data.indexed.indexed_files import check_contiguous, open_index
from megatron_ext.data.indexed.manifest import read_manifest, write_manifest
from megatron_ext.testing.tiny_datasets import write_dataset

sequences = st.lists(st.integers(0, 200), min_size=1, max_size=6)
documents_of_sequences = st.lists(st.lists(sequences, max_size=3), max_size=12)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, also for a few documents; no waiting for the disk."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(rewrite, "_CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(rewrite, "_READ_BYTES", 10)


def read(prefix: Any) -> Any:
    """Documents as lists of sequences, by mcore's reader."""
    index = open_index(prefix)
    check_contiguous(index)
    if index.num_tokens == 0:  # mcore cannot map an empty file
        return [[] for _ in range(index.num_documents)]
    dataset = IndexedDataset(prefix)
    bounds = dataset.document_indices.tolist()
    return [[dataset[number].tolist() for number in range(a, b)] for a, b in pairwise(bounds)]


@given(parts=st.lists(documents_of_sequences, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_merge_is_concatenation(tmp_path_factory: pytest.TempPathFactory, parts: Any) -> None:
    folder = tmp_path_factory.mktemp("merge")
    prefixes = [f"{folder}/{number}" for number in range(len(parts))]
    for prefix, documents in zip(prefixes, parts, strict=True):
        write_dataset(prefix, documents)
    merge(prefixes, f"{folder}/out")
    assert read(f"{folder}/out") == [document for documents in parts for document in documents]


@given(documents=documents_of_sequences, shares=st.lists(st.floats(0.01, 10), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_split_loses_and_reorders_nothing(
    tmp_path_factory: pytest.TempPathFactory, documents: Any, shares: Any
) -> None:
    folder = tmp_path_factory.mktemp("split")
    write_dataset(f"{folder}/d", documents)
    outputs = [f"{folder}/part{number}" for number in range(len(shares))]
    bounds = np.round(np.cumsum([0.0, *shares]) / sum(shares) * len(documents))
    if not np.diff(bounds).all():
        with pytest.raises(ValueError, match=f"would get none of the {len(documents)} documents"):
            split(f"{folder}/d", outputs, shares)
        return
    split(f"{folder}/d", outputs, shares)
    parts = [read(output) for output in outputs]
    assert [document for part in parts for document in part] == documents
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share / sum(shares) * len(documents)) <= 1


@given(documents=documents_of_sequences, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_shuffle_keeps_every_document_and_the_alignment_of_per_layer_data(
    tmp_path_factory: pytest.TempPathFactory, documents: Any, seed: Any
) -> None:
    folder = tmp_path_factory.mktemp("shuffle")
    write_dataset(f"{folder}/d", documents)
    doubled = [[[2 * token for token in sequence] for sequence in document] for document in documents]
    write_dataset(f"{folder}/pl", doubled, np.int32)
    shuffle(f"{folder}/d", f"{folder}/out", seed=seed)
    shuffle(f"{folder}/pl", f"{folder}/out_pl", seed=seed)
    result = read(f"{folder}/out")
    assert sorted(result) == sorted(documents)
    assert read(f"{folder}/out_pl") == [
        [[2 * t for t in sequence] for sequence in document] for document in result
    ]


@given(total=st.integers(1, 5000), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_permutation_visits_every_number_once(total: Any, seed: Any) -> None:
    assert sorted(permuted(np.arange(total), total, seed).tolist()) == list(range(total))


def test_permutation_is_seeded_and_mixes_well() -> None:
    first, second = (permuted(np.arange(20_000), 20_000, seed) for seed in (1, 2))
    assert not np.array_equal(first, second)
    for order in (first, second):
        assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.05
        assert (np.diff(order) == 1).mean() < 0.01
        assert abs(order[:1000].mean() / 10_000 - 1) < 0.1


def test_orders_of_the_same_dataset_differ_by_seed(tmp_path: Path) -> None:
    write_dataset(f"{tmp_path}/d", [[[number]] for number in range(100)])
    for seed in (1, 2):
        shuffle(f"{tmp_path}/d", f"{tmp_path}/{seed}", seed=seed)
    assert read(f"{tmp_path}/1") != read(f"{tmp_path}/2")
    assert read(f"{tmp_path}/1") != read(f"{tmp_path}/d")


def test_manifests_say_where_the_new_data_comes_from(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_dataset(f"{tmp_path}/{name}", [[[1, 2]], [[3]]])
        per_layer = {"strategy": "identity", "vocab_size": 9, "source": "gone", "source_checksum": "x"}
        write_manifest(
            f"{tmp_path}/{name}",
            tool="t",
            tokenizer={"fingerprint": "f"},
            inputs=[],
            extra={"per_layer": per_layer},
        )
    merge([f"{tmp_path}/a", f"{tmp_path}/b"], f"{tmp_path}/out")
    manifest = read_manifest(f"{tmp_path}/out")
    assert manifest is not None
    assert manifest["tool"] == "data merge"
    assert manifest["tokenizer"] == {"fingerprint": "f"}
    assert manifest["counts"] == {"documents": 4, "sequences": 4, "tokens": 6}
    assert [entry["path"] for entry in manifest["inputs"]] == [f"{tmp_path}/a.bin", f"{tmp_path}/b.bin"]
    assert manifest["per_layer"]["strategy"] == "identity"
    assert "source" not in manifest["per_layer"]  # it is aligned with no dataset that exists


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    write_dataset(f"{tmp_path}/a", [[[1, 2]], [[3]]])
    write_dataset(f"{tmp_path}/b", [[[1]]], np.int32)
    write_dataset(f"{tmp_path}/c", [[[1]]])
    a, b, c, out = (f"{tmp_path}/{name}" for name in ("a", "b", "c", "out"))
    for call, message in (
        (lambda: merge([a, b], out), "different token types: .*a is uint16, .*b is int32"),
        (lambda: merge([a, c], c), "--output-prefix .*c: is also an input"),
        (lambda: shuffle(a, a, seed=1), "is also an input"),
        (lambda: split(a, [out], [1, 2]), "--shares has 2 values, but --output-prefix has 1"),
        (lambda: split(a, [out, out], [1, 2]), "a prefix is given twice"),
        (lambda: split(a, [out, c], [1, 0]), "must all be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for prefix, fingerprint in ((a, "one"), (c, "two")):
        write_manifest(prefix, tool="t", tokenizer={"fingerprint": fingerprint}, inputs=[])
    with pytest.raises(ValueError, match="the tokenizer of .*a is one, but that of .*c is two"):
        merge([a, c], out)
    assert not list(tmp_path.glob("out*"))


def interrupted(prefix: Any) -> None:
    """A writer that is interrupted after one document."""
    with DatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add([b"\1\0"], np.array([1]), np.array([1]))
        raise KeyboardInterrupt


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(f"{tmp_path}/out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rewrite, "write_index", disk_full)
    writer = DatasetWriter(f"{tmp_path}/out", np.dtype(np.uint16))
    with pytest.raises(OSError, match="No space left"), writer:
        writer.add([b"\1\0"], np.array([1]), np.array([1]))
    assert not list(tmp_path.iterdir())


@given(sizes=st.lists(st.integers(0, 70), max_size=20))
@settings(max_examples=40, deadline=None)
def test_histogram_counts_documents_by_powers_of_two(
    tmp_path_factory: pytest.TempPathFactory, sizes: Any
) -> None:
    folder = tmp_path_factory.mktemp("histogram")
    write_dataset(f"{folder}/d", [[[1] * size] if size else [] for size in sizes])
    expected: dict[int, int] = {}
    for size in sizes:
        smallest = 1 << (size.bit_length() - 1) if size else 0
        expected[smallest] = expected.get(smallest, 0) + 1
    assert dict(length_histogram(open_index(f"{folder}/d"))) == expected
