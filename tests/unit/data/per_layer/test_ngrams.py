"""Numbers of n-grams and the rows that they are hashed to, against the formulas in Python's own integers."""

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.per_layer.ngrams import (
    LARGEST_VOCABULARY,
    HashFunction,
    check_vocabulary,
    hash_functions,
    ngram_numbers,
    starts_after,
    tokens_of_ngram,
)

TOKENS = {"bigram_hash": 2, "trigram_hash": 3}
PRIME = 2**31 - 1
EOD = 7


def all_rows(numbers: torch.Tensor, functions: list[HashFunction], rows: int) -> torch.Tensor:
    """What each function gives: [...] -> [..., functions]."""
    return torch.stack([function(numbers, rows) for function in functions], dim=-1)


tokens_with_ends = st.lists(st.one_of(st.just(EOD), st.integers(0, LARGEST_VOCABULARY - 1)), max_size=12)


def slow_ngram(tokens: list[int], place: int, count: int) -> list[int]:
    """The tokens of an n-gram, the last one first; cut where a document ends."""
    found = [tokens[place]]
    for earlier in range(place - 1, max(place - count, -1), -1):
        if tokens[earlier] == EOD:
            break
        found.append(tokens[earlier])
    return found


def slow_constant(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % (PRIME - 1) + 1


def slow_rows(ngram: list[int], strategy: Any, functions: int, rows: int) -> list[int]:
    """The rows of an n-gram, by the formula."""
    digits = [token + 1 for token in ngram] + [0, 0]
    found = []
    for read in range(2, TOKENS[strategy] + 1):
        for number in range(functions):
            name = f"{read} tokens, function {number}, "
            total = slow_constant(f"{name}offset")
            total += sum(slow_constant(f"{name}factor {place}") * digits[place] for place in range(read))
            found.append(total % PRIME % rows)
    return found


@settings(deadline=None)
@given(
    tokens=tokens_with_ends,
    strategy=st.sampled_from(sorted(TOKENS)),
    functions=st.integers(1, 4),
    rows=st.one_of(st.integers(1, 100), st.just(PRIME), st.just(PRIME - 1)),
)
def test_rows_are_those_of_the_formula_in_exact_integers(
    tokens: list[int], strategy: Any, functions: int, rows: int
) -> None:
    tensor = torch.tensor([tokens], dtype=torch.int64)
    numbers = ngram_numbers(tensor, starts_after(tensor, EOD), strategy)
    found = all_rows(numbers, hash_functions(strategy, functions), rows)
    ngrams = [slow_ngram(tokens, place, TOKENS[strategy]) for place in range(len(tokens))]
    assert found[0].tolist() == [slow_rows(ngram, strategy, functions, rows) for ngram in ngrams]
    assert [tokens_of_ngram(number) for number in numbers[0].tolist()] == [ngram[::-1] for ngram in ngrams]


def test_the_rows_of_an_ngram_never_change() -> None:
    numbers = ngram_numbers(
        torch.tensor([[1000, 2000, 3000]]), torch.zeros(1, 3, dtype=torch.bool), "trigram_hash"
    )
    assert numbers.tolist() == [[1001, 2001 + (1001 << 21), 3001 + (2001 << 21) + (1001 << 42)]]
    # Worked out by hand from the SHA-256 of the functions' names: a checkpoint depends on them.
    assert all_rows(numbers, hash_functions("trigram_hash", 2), 1_000_000)[0].tolist() == ROWS


ROWS = [[376723, 520757, 206002, 445196], [309854, 989140, 74608, 420582], [918264, 731280, 477434, 617757]]


def test_numpy_and_torch_compute_the_same_rows_without_leaving_int64() -> None:
    tokens = torch.randint(0, LARGEST_VOCABULARY, (4, 500), generator=torch.Generator().manual_seed(1))
    tokens[:, ::50] = EOD
    in_numpy = tokens.numpy()
    numbers = ngram_numbers(tokens, starts_after(tokens, EOD), "trigram_hash")
    others = ngram_numbers(in_numpy, starts_after(in_numpy, EOD), "trigram_hash")
    assert others.dtype == np.int64 and np.array_equal(numbers.numpy(), others)
    assert others.min() > 0
    for function in hash_functions("trigram_hash", 2):
        rows = function(others, 54_321)
        assert rows.dtype == np.int64 and np.array_equal(function(numbers, 54_321).numpy(), rows)


def test_ngrams_share_rows_as_rarely_as_random_rows_do() -> None:
    generator = torch.Generator().manual_seed(2)
    # Token ids as a tokenizer numbers them: small ones are frequent, and n-grams differ in single tokens.
    tokens = (50_000 ** torch.rand(200_000, generator=generator)).long()
    numbers = ngram_numbers(tokens, starts_after(tokens, None), "trigram_hash").unique()
    rows = 65_536
    found = all_rows(numbers, hash_functions("trigram_hash", 2), rows)
    expected = math.comb(len(numbers), 2) / rows
    for column in found[:, 2:].T:  # the functions of three tokens
        counts = torch.bincount(column, minlength=rows).double()
        pairs = float((counts * (counts - 1)).sum() / 2)
        assert pairs == pytest.approx(expected, rel=0.05)
    together = found[:, 2] * rows + found[:, 3]
    shared = len(together) - len(together.unique())
    assert shared < 5 * expected / rows + 10


def test_a_vocabulary_whose_ngrams_have_no_number_is_refused() -> None:
    check_vocabulary("bigram_hash", 2_097_151)
    with pytest.raises(
        ValueError, match=r"--per-layer-strategy bigram_hash: supports at most 2,097,151 token"
    ):
        check_vocabulary("bigram_hash", 2_097_152)
