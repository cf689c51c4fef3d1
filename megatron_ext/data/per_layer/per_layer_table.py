"""The table that maps the main tokenizer's ids to per-layer ids, and the file that holds it.

    per_layer_ids = table[token_ids]          table: [V], values 0 .. rows - 1

A strategy (see `per_layer_vocab`) keeps only a part of the per-layer vocabulary: `syntax_focus` keeps about 350 of ten
thousand entries. The table renumbers the kept entries without gaps, in the vocabulary's order; the special tokens come
first and keep their ids. Each id is one row of a model's per-layer embedding tables. The file `NAME.STRATEGY.npz` lies
beside the vocabulary `NAME.json` and holds these arrays:

    table        int32 [V]
    entries      int32 [rows], for each row, its id in the vocabulary (absent from older files, where both are the same)
    seed, tokenizer, vocabulary    the seed, the tokenizer's fingerprint and the vocabulary's SHA-256
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.indexed.manifest import sha256_of, write_atomically
from megatron_ext.data.per_layer.per_layer_vocab import (
    SPECIAL_TOKENS,
    TableArray,
    load_vocabulary,
)
from megatron_ext.data.per_layer.strategies import WITHOUT_VOCABULARY, Strategy
from megatron_ext.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class StoredTable:
    """The content of the file that holds a table."""

    table: TableArray
    """[V] per-layer id of each token id."""

    entries: TableArray | None
    """[rows] for each per-layer id, its id in the vocabulary; None if both are the same."""

    seed: int
    """Seed with which `random_subset` chose its forms."""

    tokenizer: str
    """Fingerprint of the main tokenizer that the table was made for."""

    vocabulary: str
    """SHA-256 of the vocabulary file that the table was made from."""


def number_densely(by_vocabulary: TableArray) -> tuple[TableArray, TableArray]:
    """Renumbers per-layer ids without gaps, in the same order; special tokens keep their ids.

    Args:
        by_vocabulary: [V] for each token id, its id in the vocabulary; from `build_table`.

    Returns:
        The table [V] with the new ids, and for each new id its id in the vocabulary [rows].
    """
    entries = np.union1d(np.arange(len(SPECIAL_TOKENS)), by_vocabulary).astype(np.int32)
    return np.searchsorted(entries, by_vocabulary).astype(np.int32), entries


def rows_of(table: TableArray) -> int:
    """Returns the number of embedding rows that a model needs for the ids of a table, special tokens included."""
    return max(int(table.max()) + 1, len(SPECIAL_TOKENS))


def table_path(vocab_file: str, strategy: Strategy) -> str:
    """Returns the path of a strategy's table: `NAME.STRATEGY.npz`, beside the vocabulary `NAME.json`."""
    return f"{Path(vocab_file).with_suffix('')}.{strategy}.npz"


def save_table(
    vocab_file: str,
    strategy: Strategy,
    table: TableArray,
    *,
    tokenizer_fingerprint: str,
    seed: int,
    entries: TableArray | None = None,
) -> None:
    """Writes a table atomically beside its vocabulary, with the seed, tokenizer and vocabulary it was made from."""
    more: dict[str, Any] = {} if entries is None else {"entries": entries}
    with write_atomically(table_path(vocab_file, strategy)) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            table=table,
            seed=seed,
            tokenizer=tokenizer_fingerprint,
            vocabulary=sha256_of(vocab_file),
            **more,
        )


def read_table(vocab_file: str, strategy: Strategy) -> StoredTable | None:
    """Reads the table beside a vocabulary; returns None if there is none.

    Raises:
        ValueError: the file is not a table.
    """
    path = table_path(vocab_file, strategy)
    if not Path(path).is_file():
        return None
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return StoredTable(
                table=stored["table"],
                entries=stored.get("entries"),
                seed=int(stored["seed"]),
                tokenizer=str(stored["tokenizer"]),
                vocabulary=str(stored["vocabulary"]),
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a per-layer table ({error}); remove it, "
            "and make it again with tools/preprocess_per_layer_data.py"
        ) from None


def row_names(vocab_file: str, strategy: Strategy) -> dict[int, str]:
    """Maps each per-layer id of a strategy to its text in the vocabulary.

    Raises:
        FileNotFoundError, ValueError: see `load_vocabulary` and `read_table`.
    """
    text_of = {number: text for text, number in load_vocabulary(vocab_file).items()}
    stored = read_table(vocab_file, strategy)
    if stored is None or stored.entries is None:
        return text_of
    return {row: text_of.get(entry, "") for row, entry in enumerate(stored.entries.tolist())}


def load_per_layer_table(strategy: Strategy, *, tokenizer: Tokenizer, vocab_file: str | None) -> TableArray:
    """Loads the table from which training computes per-layer ids, int32 [V].

    For the strategies in `WITHOUT_VOCABULARY`, no file is read, and the table maps each token id to itself.

    For `attention_guidance` the table is not enough, since some ids depend on the position: a training run must read
    the aligned dataset instead, and `per_layer_ids.document_ids` computes the ids of a prompt.

    Raises:
        FileNotFoundError: the vocabulary or the table is missing.
        ValueError: no vocabulary is given, or the table was made for another tokenizer or vocabulary.
    """
    if strategy in WITHOUT_VOCABULARY:
        return np.arange(tokenizer.vocab_size, dtype=np.int32)
    if vocab_file is None:
        raise ValueError(f"--per-layer-strategy {strategy}: requires --per-layer-vocab-file")
    load_vocabulary(vocab_file)
    path = table_path(vocab_file, strategy)
    remedy = f"make it with: python tools/preprocess_per_layer_data.py ... --per-layer-strategy {strategy}"
    stored = read_table(vocab_file, strategy)
    if stored is None:
        raise FileNotFoundError(f"per-layer table not found: {path}; {remedy}")
    if stored.tokenizer != tokenizer.fingerprint():
        raise ValueError(
            f"{path} is for the tokenizer with the fingerprint {stored.tokenizer}, but this run's has "
            f"{tokenizer.fingerprint()}; {remedy}"
        )
    if stored.vocabulary != sha256_of(vocab_file):
        raise ValueError(f"{path} was made from another version of {vocab_file}; {remedy}")
    return stored.table
