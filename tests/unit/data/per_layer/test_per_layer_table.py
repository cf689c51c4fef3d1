"""Tables of per-layer ids: numbered without holes, for every strategy, and kept in a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.data.per_layer.per_layer_table import (
    load_per_layer_table,
    number_densely,
    read_table,
    row_names,
    rows_of,
    save_table,
    table_path,
)
from megatron_ext.data.per_layer.per_layer_vocab import (
    SPECIAL_TOKENS,
    build_table,
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
    token_forms,
)
from megatron_ext.data.per_layer.strategies import STRATEGIES, WITHOUT_VOCABULARY
from megatron_ext.testing.tiny_datasets import ListTokenizer

WORDS = [f"word{letter * count}" for letter in "abcdefghij" for count in range(1, 21)]
PIECES = ["<eod>", "<s>", "\u2581the", "The", "(", ".", "def", "7", "1984", "\n", *WORDS, "of", "return", ";"]


@pytest.fixture
def tokenizer() -> Any:
    return ListTokenizer(PIECES)


@pytest.fixture
def vocabulary(tokenizer: Any) -> Any:
    counts = np.arange(len(PIECES), 0, -1)
    return build_vocabulary(token_forms(tokenizer), counts, 10_000)


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - set(WITHOUT_VOCABULARY)))
def test_dense_ids_mean_what_the_vocabularys_ids_mean_and_leave_no_hole(
    tokenizer: Any, vocabulary: Any, strategy: Any, tmp_path: Path
) -> None:
    by_vocabulary = build_table(strategy, token_forms(tokenizer), vocabulary)
    table, entries = number_densely(by_vocabulary)
    text = {number: name for name, number in vocabulary.items()}
    path = str(tmp_path / "v.json")
    save_vocabulary(path, vocabulary)
    save_table(path, strategy, table, tokenizer_fingerprint="f", seed=1, entries=entries)
    named = row_names(path, strategy)
    assert [named[row] for row in table.tolist()] == [text[number] for number in by_vocabulary.tolist()]
    assert [named[row] for row in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    own = {row for row in table.tolist() if row >= len(SPECIAL_TOKENS)}
    assert own == set(range(len(SPECIAL_TOKENS), rows_of(table)))
    assert len(named) == rows_of(table) == len(entries)
    if strategy in ("syntax_focus", "attention_guidance"):  # the, (, ., def, 7, of, return, ;
        assert len(own) == 8


def test_a_table_without_a_form_of_its_own_still_has_rows_for_all_marks() -> None:
    table, entries = number_densely(np.array([6, 6, 1], dtype=np.int32))
    assert table.tolist() == [6, 6, 1]
    assert rows_of(table) == len(entries) == len(SPECIAL_TOKENS)


def test_a_table_of_an_earlier_version_is_read_as_it_was_made(
    tokenizer: Any, vocabulary: Any, tmp_path: Path
) -> None:
    path = str(tmp_path / "v.json")
    save_vocabulary(path, vocabulary)
    table = build_table("syntax_focus", token_forms(tokenizer), vocabulary)
    save_table(path, "syntax_focus", table, tokenizer_fingerprint=tokenizer.fingerprint(), seed=1)
    loaded = load_per_layer_table("syntax_focus", tokenizer=tokenizer, vocab_file=path)
    assert np.array_equal(loaded, table) and rows_of(loaded) == int(table.max()) + 1
    assert row_names(path, "syntax_focus") == {number: text for text, number in vocabulary.items()}


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    Path(table_path(str(tmp_path / "v.json"), "syntax_focus")).write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"v\.syntax_focus\.npz is not a per-layer table .* remove it"):
        read_table(str(tmp_path / "v.json"), "syntax_focus")


def test_table_is_kept_beside_its_vocabulary_and_checked_when_loaded(
    tokenizer: Any, vocabulary: Any, tmp_path: Path
) -> None:
    path = str(tmp_path / "v.json")
    with pytest.raises(FileNotFoundError, match=r"per-layer vocabulary not found: .*v\.json"):
        load_per_layer_table("syntax_focus", tokenizer=tokenizer, vocab_file=path)
    save_vocabulary(path, vocabulary)
    assert load_vocabulary(path) == json.loads((tmp_path / "v.json").read_text()) == vocabulary
    with pytest.raises(
        FileNotFoundError, match=r"table not found: .*v\.syntax_focus\.npz; make it with: python tools"
    ):
        load_per_layer_table("syntax_focus", tokenizer=tokenizer, vocab_file=path)
    table = build_table("syntax_focus", token_forms(tokenizer), vocabulary)
    save_table(path, "syntax_focus", table, tokenizer_fingerprint=tokenizer.fingerprint(), seed=1)
    assert table_path(path, "syntax_focus") == str(tmp_path / "v.syntax_focus.npz")
    assert np.array_equal(load_per_layer_table("syntax_focus", tokenizer=tokenizer, vocab_file=path), table)
    with pytest.raises(ValueError, match="is for the tokenizer"):
        load_per_layer_table("syntax_focus", tokenizer=ListTokenizer(PIECES[:-1]), vocab_file=path)
    save_vocabulary(path, {**vocabulary, "new": len(vocabulary)})
    with pytest.raises(ValueError, match="another version"):
        load_per_layer_table("syntax_focus", tokenizer=tokenizer, vocab_file=path)
