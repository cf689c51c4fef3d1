"""N-grams of tokens as per-layer ids: numbers that tell n-grams apart, and hash functions from numbers to rows.

The n-gram of a token t_0 consists of t_0 and the tokens before it: t_1 is directly before t_0, and t_2 before t_1. Its
number holds each of these tokens in 21 bits:

    number = d_0 + 2^21 d_1 + 2^42 d_2        d_i = t_i + 1, or 0 if there is no such token in the document

`bigram_hash` takes two tokens (d_2 = 0), `trigram_hash` three. A document begins after an end-of-document token, so the
number is a function of the tokens alone; no n-gram reaches across the beginning of a document or of a sample. The
number fits into 63 bits. An aligned dataset holds these numbers, which do not depend on the number or size of the
tables.

Each hash function reads the m nearest of an n-gram's n tokens. There are k functions for each m = 2 .. n:

    row = (c + sum over i < m of a_i d_i mod P) mod P mod rows        P = 2^31 - 1, a prime

For random c and a_i, one function gives two n-grams the same row with a probability of about 1 / rows (Carter and
Wegman, 1979). That every function does so is very unlikely. c and a_i come from SHA-256 of the function's name
(`_constant`).
No product exceeds 62 bits and no value is negative, so every platform and library computes the same rows: the functions
here take arrays of numpy and tensors of torch alike, and need neither.

Literature: Engram (arXiv 2601.07372; n-grams of two orders, several hash functions each), over-encoding (2501.16975),
BLT (2412.09871; sums of rows of hashed n-grams), hash embeddings (1709.03933; several rows per entry).
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from megatron_ext.data.per_layer.strategies import NGRAM_TOKENS, Strategy

Integers = Any
"""An int64 array of numpy, or tensor of torch."""

LARGEST_VOCABULARY = (1 << 21) - 1
"""Largest vocabulary size with which every d_i of the formula above fits into 21 bits."""

PRIME = (1 << 31) - 1
_BITS = 21


def check_vocabulary(strategy: Strategy, vocab_size: int) -> None:
    """Raises `ValueError` if a vocabulary has more token ids than fit into the bits of an n-gram's number."""
    if vocab_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"--per-layer-strategy {strategy}: supports at most {LARGEST_VOCABULARY:,} token ids, but the tokenizer "
            f"has {vocab_size:,}"
        )


@dataclass(frozen=True)
class HashFunction:
    """Maps the numbers of n-grams to rows."""

    factors: tuple[int, ...]
    """The constants a_i of the formula above, one for each token that is read, the nearest token first."""

    offset: int
    """The constant c of the formula above."""

    def __call__(self, numbers: Integers, rows: int) -> Integers:
        """Returns the row, 0 .. rows - 1, of each number."""
        total = numbers * 0 + self.offset
        for place, factor in enumerate(self.factors):
            total += token_digits(numbers, place) * factor % PRIME
        return total % PRIME % rows


def hash_functions(strategy: Strategy, count: int) -> list[HashFunction]:
    """Returns `count` functions that read the nearest 2 tokens; with `trigram_hash`, then `count` that read 3."""
    return [
        HashFunction(
            tuple(_constant(f"{read} tokens, function {number}, factor {place}") for place in range(read)),
            _constant(f"{read} tokens, function {number}, offset"),
        )
        for read in range(2, NGRAM_TOKENS[strategy] + 1)
        for number in range(count)
    ]


def _constant(name: str) -> int:
    """Returns a number from 1 to P - 1: the first 8 bytes of the name's SHA-256, big endian, mod P - 1, plus 1."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % (PRIME - 1) + 1


def ngram_numbers(tokens: Integers, starts: Any, strategy: Strategy) -> Integers:
    """Returns the number of the n-gram that ends at each token.

    Args:
        tokens: token ids [..., s], below `LARGEST_VOCABULARY`.
        starts: [..., s], True where a document begins. No n-gram reaches back before position 0.
        strategy: the strategy, which decides how many tokens an n-gram has.
    """
    digits = tokens + 1
    numbers = digits * 1
    for place in range(1, NGRAM_TOKENS[strategy]):
        earlier = digits * 0
        earlier[..., 1:] = digits[..., :-1]
        digits = earlier * ~starts
        numbers |= digits << (_BITS * place)
    return numbers


def starts_after(tokens: Integers, eod: int | None) -> Any:
    """Returns [..., s], True for each token directly after an end-of-document token.

    Args:
        tokens: token ids [..., s].
        eod: id of the end-of-document token; None for a tokenizer without one.
    """
    starts = tokens != tokens
    if eod is not None:
        starts[..., 1:] = tokens[..., :-1] == eod
    return starts


def token_digits(numbers: Integers, place: int) -> Integers:
    """Returns d_i for i = `place`: the token id plus 1, or 0 for no token."""
    return (numbers >> (_BITS * place)) & LARGEST_VOCABULARY


def tokens_of_ngram(number: int) -> list[int]:
    """Returns the token ids of the n-gram that a number stands for, in the order of the text."""
    digits = [number >> (_BITS * place) & LARGEST_VOCABULARY for place in (2, 1, 0)]
    return [digit - 1 for digit in digits if digit]
