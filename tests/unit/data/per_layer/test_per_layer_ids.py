"""The aligned dataset, against a token-by-token loop over what mcore reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.data.per_layer import per_layer_ids as ids_module
from megatron_ext.data.per_layer.per_layer_ids import count_tokens, document_ids, write_aligned
from megatron_ext.data.per_layer.per_layer_vocab import SPECIAL
from megatron_ext.data.per_layer.strategies import STRATEGIES
from megatron_ext.testing.tiny_datasets import write_dataset

VOCAB = 50
EOD = 49
TABLE = (np.arange(VOCAB)[::-1] + 100).astype(np.int32)

sequences = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=27)
documents_of_sequences = st.lists(st.lists(sequences, max_size=3), min_size=0, max_size=9)


def slow_ids(document: Any, strategy: Any) -> Any:
    """Per-layer ids of one document, by the rules one token at a time."""
    if strategy in ("bigram_hash", "trigram_hash"):
        return [
            slow_number(document[: place + 1], 2 + (strategy == "trigram_hash"))
            for place in range(len(document))
        ]
    ids = []
    for position, token in enumerate(document):
        if strategy == "attention_guidance" and position == len(document) - 1 and token == EOD:
            ids.append(SPECIAL["<|layer_end|>"])
        elif strategy == "attention_guidance" and position == 0:
            ids.append(SPECIAL["<|layer_start|>"])
        elif strategy == "attention_guidance" and position % 10 == 0:
            ids.append(SPECIAL["<|attention|>"])
        else:
            ids.append(int(TABLE[token]))
    return ids


def slow_number(tokens: Any, count: Any) -> Any:
    """The number of the n-gram at the end of a document's tokens, of `count` tokens at most."""
    ends = [place for place, token in enumerate(tokens[:-1]) if token == EOD]
    after = tokens[ends[-1] + 1 :] if ends else tokens
    return sum((token + 1) * 2 ** (21 * place) for place, token in enumerate(after[::-1][:count]))


def write(folder: Any, strategy: Any, prefix: Any = "a", size: Any = 200) -> None:
    write_aligned(
        open_index(f"{folder}/d"), f"{folder}/{prefix}", TABLE, strategy, eod=EOD, per_layer_vocab_size=size
    )


@given(
    documents=documents_of_sequences,
    strategy=st.sampled_from(STRATEGIES),
    chunk=st.sampled_from([1, 7, 10, 1000]),
)
@settings(max_examples=80, deadline=None)
def test_aligned_dataset_equals_the_rules_token_by_token(
    tmp_path_factory: pytest.TempPathFactory, documents: Any, strategy: Any, chunk: Any
) -> None:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(f"{folder}/d", documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids_module, "_CHUNK_TOKENS", chunk)
        patch.setattr(ids_module, "_CHUNK_DOCUMENTS", 2)
        patch.setattr("os.fsync", lambda _: None)
        write(folder, strategy)
    expected = [slow_ids([t for sequence in document for t in sequence], strategy) for document in documents]
    assert open_index(f"{folder}/a").tokens().tolist() == [value for ids in expected for value in ids]
    for document, ids in zip(documents, expected, strict=True):
        tokens = np.array([t for sequence in document for t in sequence], dtype=np.int64)
        assert document_ids(tokens, TABLE, strategy, eod=EOD).tolist() == ids
    if any(documents):  # mcore cannot map an empty file
        main, aligned = IndexedDataset(f"{folder}/d"), IndexedDataset(f"{folder}/a", mmap=False)
        assert aligned.sequence_lengths.tolist() == main.sequence_lengths.tolist()
        assert aligned.document_indices.tolist() == main.document_indices.tolist()
        for number in range(len(main)):
            assert len(aligned[number]) == len(main[number])


@pytest.mark.parametrize(("size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_id_type_follows_the_per_layer_vocabulary_as_mcores_does(
    tmp_path: Path, size: Any, dtype: Any
) -> None:
    write_dataset(f"{tmp_path}/d", [[[1, 2]], [[3]]])
    write(tmp_path, "syntax_focus", size=size)
    dataset = IndexedDataset(f"{tmp_path}/a")
    assert dataset.index.dtype is dtype
    assert dataset[0].tolist() == TABLE[[1, 2]].tolist()


def test_tokens_are_counted_and_a_foreign_token_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids_module, "_CHUNK_TOKENS", 3)
    write_dataset(f"{tmp_path}/d", [[[1, 2, 1]], [[3, 1, 60]]])
    index = open_index(f"{tmp_path}/d")
    assert count_tokens(index, 61).tolist() == np.bincount([1, 2, 1, 3, 1, 60], minlength=61).tolist()
    with pytest.raises(ValueError, match=r"d\.bin holds token id 60, but the vocabulary has 50 ids"):
        count_tokens(index, VOCAB)
    with pytest.raises(ValueError, match="holds token id 60"):
        write(tmp_path, "identity")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]
    write_dataset(f"{tmp_path}/d", [[[1, -2]]], np.int32)
    with pytest.raises(ValueError, match="holds token id -2"):
        count_tokens(open_index(f"{tmp_path}/d"), VOCAB)


def test_a_run_killed_between_the_renames_leaves_no_old_index_over_new_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(f"{tmp_path}/d", [[[1, 2, 3]]])
    write(tmp_path, "syntax_focus")
    (tmp_path / "a.json").write_text("{}")
    renamed = []

    def fail_on_index(source: Any, target: Any) -> None:
        renamed.append(str(target))
        if str(target).endswith(".idx"):
            raise OSError("killed")

    monkeypatch.setattr("os.replace", fail_on_index)
    with pytest.raises(OSError, match="killed"):
        write(tmp_path, "syntax_focus")
    assert [name[-4:] for name in renamed] == [".bin", ".idx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "d.bin", "d.idx"]
