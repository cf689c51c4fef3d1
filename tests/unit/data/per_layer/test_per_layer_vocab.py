"""Per-layer vocabularies and tables, against expectations written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.per_layer.per_layer_table import load_per_layer_table
from megatron_ext.data.per_layer.per_layer_vocab import (
    SPECIAL,
    SPECIAL_TOKENS,
    build_table,
    build_vocabulary,
    form_of,
    load_vocabulary,
    token_forms,
)
from megatron_ext.data.per_layer.strategies import STRATEGIES, WITHOUT_VOCABULARY
from megatron_ext.testing.tiny_datasets import ListTokenizer

OCCURRENCES = {
    "<eod>": 10, "▁the": 50, "The": 5, "▁cat": 20, "s": 8, "▁": 3, "\n": 9, "\n\n": 1, "7": 7, "▁1984": 4, "(": 6,
    "▁)": 6, "def": 30, "\ufffd": 2, "x2": 1, "▁zebra": 0, "<s>": 1, "...": 2,
}  # fmt: skip
PIECES, COUNTS = list(OCCURRENCES), list(OCCURRENCES.values())
FIRST = len(SPECIAL_TOKENS)
# By frequency: the 50 + 5, def 30, cat 20, s 8, 7 7, ( and ) 6 in the order of their text, 1984 4, ... 2, x2 1
EXPECTED = ["the", "def", "cat", "s", "7", "(", ")", "1984", "...", "x2"]


@pytest.fixture
def tokenizer() -> Any:
    return ListTokenizer(PIECES)


def vocabulary_of(tokenizer: Any, size: Any = 100) -> Any:
    return build_vocabulary(token_forms(tokenizer), np.array(COUNTS), size)


def names(tokenizer: Any, strategy: Any, size: Any = 100) -> Any:
    vocabulary = vocabulary_of(tokenizer, size)
    text = {number: name for name, number in vocabulary.items()}
    return [text[number] for number in build_table(strategy, token_forms(tokenizer), vocabulary).tolist()]


def test_vocabulary_has_document_003s_special_tokens_first_then_ours_then_forms_by_frequency(
    tokenizer: Any,
) -> None:
    vocabulary = vocabulary_of(tokenizer)
    assert list(vocabulary)[:4] == ["<|startoftext|>", "<|endoftext|>", "<|layer_start|>", "<|attention|>"]
    assert list(vocabulary)[:FIRST] == list(SPECIAL_TOKENS)
    assert list(vocabulary)[FIRST:] == EXPECTED
    assert list(vocabulary.values()) == list(range(len(vocabulary)))


def test_vocabulary_size_is_an_upper_bound(tokenizer: Any) -> None:
    assert list(vocabulary_of(tokenizer, FIRST + 3))[FIRST:] == ["the", "def", "cat"]
    assert list(vocabulary_of(tokenizer, FIRST)) == list(SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="--per-layer-vocab-size 10 must be at least 15"):
        vocabulary_of(tokenizer, 10)


def test_syntax_focus_keeps_syntax_and_puts_the_rest_into_shape_classes(tokenizer: Any) -> None:
    # fmt: off
    expected = ["<|endoftext|>", "the", "the", "<|word_start|>", "<|word_continuation|>", "<|space|>", "<|newline|>",
                "<|newline|>", "7", "<|number|>", "(", ")", "def", "<|bytes|>", "<|mixed|>", "<|word_start|>",
                "<|startoftext|>", "..."]
    # fmt: on
    assert names(tokenizer, "syntax_focus") == expected
    assert names(tokenizer, "attention_guidance") == expected


def test_syntax_that_the_vocabulary_does_not_hold_falls_into_its_shape_class(tokenizer: Any) -> None:
    result = names(tokenizer, "syntax_focus", FIRST + 2)  # holds "the" and "def"
    assert [result[number] for number in (1, 8, 10, 12)] == ["the", "<|number|>", "<|symbol|>", "def"]


def test_semantic_focus_keeps_frequent_content(tokenizer: Any) -> None:
    expected = [
        "<|endoftext|>",
        "<|context|>",
        "<|context|>",
        "cat",
        "s",
        "<|context|>",
        "<|context|>",
        "<|context|>",
    ]
    expected += ["7", "1984", "<|context|>", "<|context|>", "<|context|>", "<|unk|>", "x2", "<|unk|>"]
    assert names(tokenizer, "semantic_focus") == [*expected, "<|startoftext|>", "<|context|>"]


def test_random_subset_is_seeded_and_keeps_about_half() -> None:
    tokenizer = ListTokenizer(
        ["<eod>"] + [f"word{letter * count}" for letter in "abcdefghij" for count in range(1, 51)]
    )
    forms = token_forms(tokenizer)
    vocabulary = build_vocabulary(forms, np.ones(tokenizer.vocab_size, dtype=np.int64), 10_000)
    table = build_table("random_subset", forms, vocabulary, seed=1)
    own = table != SPECIAL["<|unk|>"]
    own[0] = False
    assert 200 < own.sum() < 300
    assert all(table[number] == vocabulary[forms[number].form] for number in np.flatnonzero(own))
    assert np.array_equal(table, build_table("random_subset", forms, vocabulary, seed=1))
    assert not np.array_equal(table, build_table("random_subset", forms, vocabulary, seed=2))


@pytest.mark.parametrize("strategy", WITHOUT_VOCABULARY)
def test_a_strategy_without_vocabulary_keeps_the_token_id(tokenizer: Any, strategy: Any) -> None:
    assert build_table(strategy, token_forms(tokenizer), {}).tolist() == list(range(len(PIECES)))
    assert load_per_layer_table(strategy, tokenizer=tokenizer, vocab_file=None).tolist() == list(
        range(len(PIECES))
    )


@settings(deadline=None)
@given(text=st.text(), starts_word=st.booleans())
def test_every_text_has_a_form_and_a_known_shape(text: Any, starts_word: Any) -> None:
    form = form_of(text, starts_word=starts_word)
    assert form.shape in SPECIAL
    assert form.form == form.form.strip()


@settings(deadline=None)
@given(pieces=st.lists(st.text(max_size=6), unique=True, min_size=1, max_size=20), data=st.data())
def test_every_table_maps_every_token_into_the_vocabulary(pieces: Any, data: Any) -> None:
    tokenizer = ListTokenizer(["<eod>", *(piece for piece in pieces if piece != "<eod>")])
    size = tokenizer.vocab_size
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    forms = token_forms(tokenizer)
    vocabulary = build_vocabulary(forms, counts, FIRST + 5)
    assert len(vocabulary) <= FIRST + 5
    for strategy in STRATEGIES:
        table = build_table(strategy, forms, vocabulary)
        assert table.shape == (size,)
        assert table.min() >= 0
        if strategy not in WITHOUT_VOCABULARY:
            assert table.max() < len(vocabulary)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a per-layer vocabulary"),
        ("[]", "is not a per-layer vocabulary"),
        ('{"a": 0, "b": 2}', "ids must count from 0"),
        ('{"a": "x"}', "ids must count from 0"),
        ('{"a": 0, "b": 1}', r"<\|startoftext\|> must have id 0"),
    ],
)
def test_another_files_content_is_not_a_vocabulary(tmp_path: Path, content: Any, message: Any) -> None:
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(str(tmp_path / "v.json"))
