"""Index files against mcore's builder and readers, and damaged ones."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_ext.data.indexed.indexed_files import (
    DTYPE_CODES,
    check_contiguous,
    open_index,
    optimal_dtype,
    write_index,
)
from megatron_ext.testing.tiny_datasets import write_dataset

sequences = st.lists(st.integers(0, 255), min_size=1, max_size=5)
documents_of_sequences = st.lists(st.lists(sequences, max_size=3), max_size=8)


@given(documents=documents_of_sequences, dtype=st.sampled_from([np.uint16, np.int32, np.int64, np.uint8]))
@settings(max_examples=60, deadline=None)
def test_index_is_read_and_written_as_mcore_does(
    tmp_path_factory: pytest.TempPathFactory, documents: Any, dtype: Any
) -> None:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(f"{folder}/d", documents, dtype)
    index = open_index(f"{folder}/d")
    flat = [sequence for document in documents for sequence in document]
    assert index.dtype == dtype
    assert index.num_documents == len(documents)
    assert index.lengths.tolist() == [len(sequence) for sequence in flat]
    assert index.tokens().tolist() == [token for sequence in flat for token in sequence]
    sizes = [sum(map(len, document)) for document in documents]
    assert index.document_starts(0, len(documents) + 1).tolist() == np.cumsum([0, *sizes]).tolist()
    starts = np.cumsum([0, *map(len, flat)]).tolist()
    assert [index.sequence_start(number) for number in range(len(flat) + 1)] == starts
    check_contiguous(index)
    write_index(f"{folder}/copy.idx", dtype, index.lengths, index.document_indices)
    assert Path(f"{folder}/copy.idx").read_bytes() == Path(f"{folder}/d.idx").read_bytes()


@pytest.mark.parametrize("mmap", [True, False])
def test_written_index_is_read_by_mcores_readers(tmp_path: Path, mmap: Any) -> None:
    tokens = np.arange(20, dtype=np.int32)
    tokens.tofile(tmp_path / "d.bin")
    write_index(tmp_path / "d.idx", np.int32, np.array([3, 10, 7]), np.array([0, 1, 1, 3]))
    dataset = IndexedDataset(str(tmp_path / "d"), mmap=mmap)
    assert [dataset[number].tolist() for number in range(3)] == [
        list(range(3)),
        list(range(3, 13)),
        list(range(13, 20)),
    ]
    assert dataset.document_indices.tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("mmap", [True, False])
def test_pointers_beyond_four_gib_are_as_mcore_reads_them(tmp_path: Path, mmap: Any) -> None:
    lengths = np.array([1_200_000_000, 1_200_000_000, 4])  # 4.8 GB of uint16, a sparse file
    with open(tmp_path / "d.bin", "wb") as stream:
        stream.seek(int(lengths[:2].sum()) * 2)
        stream.write(np.array([7, 8, 9, 10], dtype=np.uint16).tobytes())
    write_index(tmp_path / "d.idx", np.uint16, lengths, np.array([0, 1, 3]))
    dataset = IndexedDataset(str(tmp_path / "d"), mmap=mmap)
    assert dataset.get(2).tolist() == [7, 8, 9, 10]
    assert dataset.get(1, offset=1_199_999_999, length=1).tolist() == [0]
    index = open_index(str(tmp_path / "d"))
    check_contiguous(index)
    assert index.num_tokens == 2_400_000_004
    assert index.tokens()[-4:].tolist() == [7, 8, 9, 10]


@pytest.mark.parametrize("size", [None, 1, 65_499, 65_500, 65_501, 200_000])
def test_token_type_is_chosen_as_mcore_does(size: Any) -> None:
    assert optimal_dtype(size) is DType.optimal_dtype(size)


def test_dtype_codes_are_mcores() -> None:
    assert {code.value: DType.dtype_from_code(code.value) for code in DType} == DTYPE_CODES


def test_damaged_files_are_refused_with_the_file_and_both_sizes(tmp_path: Path) -> None:
    prefix = str(tmp_path / "d")
    write_dataset(prefix, [[[1, 2, 3]], [[4, 5]]])
    binary, index = tmp_path / "d.bin", tmp_path / "d.idx"
    good_bin, good_idx = binary.read_bytes(), index.read_bytes()

    for damaged in (good_bin[:-2], good_bin[:-1], good_bin + b"\0\0", b""):
        binary.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"d\.bin is {len(damaged)} bytes, but .*d\.idx describes 10"):
            open_index(prefix)
    binary.write_bytes(good_bin)
    for damaged, message in (
        (good_idx[:-3], "truncated or corrupt"),
        (good_idx[:20], "not an indexed dataset"),
        (b"MMIDIDY" + good_idx[7:], "not an indexed dataset"),
        (good_idx[:9] + b"\2" + good_idx[10:], "version 2"),
        (good_idx[:17] + b"\x63" + good_idx[18:], "code 99"),
        (good_idx[:-8] + b"\1" + good_idx[-7:], "last document does not end with"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            open_index(prefix)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"data file not found: .*d\.idx$"):
        open_index(prefix)


def test_the_prefix_given_to_preprocessing_suggests_the_datasets_it_made(tmp_path: Path) -> None:
    made = str(tmp_path / "train_text_document")
    write_dataset(made, [[[1, 2]]])
    with pytest.raises(FileNotFoundError) as error:
        open_index(str(tmp_path / "train"))
    assert str(error.value).endswith(f"train.idx; did you mean {made}?")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (34 + 4, 5, "sequence 2 has length 1 and pointer 10"),  # a length, seen at the next pointer
        (34 + 3 * 4 + 8, 2, "pointer 2"),  # a pointer
        (34 + 3 * 12 + 8, 9, "never decrease"),  # a document index, checked before the lengths can notice
        (34 + 3 * 12, 1, "must start at 0"),
    ],
)
def test_full_check_finds_a_wrong_entry(tmp_path: Path, offset: Any, value: Any, message: Any) -> None:
    write_dataset(str(tmp_path / "d"), [[[1, 2, 3], [4, 5]], [[6]]])
    with open(tmp_path / "d.idx", "r+b") as stream:
        stream.seek(offset)
        stream.write(bytes([value]))
    with pytest.raises(ValueError, match=message):
        check_contiguous(open_index(str(tmp_path / "d")))


def test_writing_an_index_leaves_a_complete_file_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ext.data.indexed.manifest import write_atomically

    (tmp_path / "d.idx").write_bytes(b"old")

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '/"),
        write_atomically(tmp_path / "d.idx") as temporary,
    ):
        write_index(temporary, np.uint16, np.array([1]), np.array([0, 1]))
    assert [path.name for path in tmp_path.iterdir()] == ["d.idx"]
    assert (tmp_path / "d.idx").read_bytes() == b"old"
