"""The table that maps main token ids to per-layer ids, numbered without gaps, and the file that holds it.

    per_layer_ids = table[token_ids]          table: [V], values 0 .. rows - 1

A strategy keeps only a part of the vocabulary (`syntax_focus` about 350 forms of ten thousand), so its ids are
renumbered in the vocabulary's order; the special tokens come first and keep their ids. Each id is one row of a model's
per-layer tables. `NAME.STRATEGY.npz` beside the vocabulary `NAME.json` holds:

    table        int32 [V]
    entries      int32 [rows], the vocabulary's id of each row (missing in older files, whose rows are the vocabulary's)
    seed, tokenizer, vocabulary    what it was made with: seed, the tokenizer's fingerprint, the vocabulary's SHA-256
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.indexed.manifest import sha256_of, write_atomically
from megatron_ext.data.per_layer.per_layer_vocab import SPECIAL_TOKENS, Strategy, TableArray, load_vocabulary
from megatron_ext.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class StoredTable:
    """The content of a table's file."""

    table: TableArray
    """[V] per-layer id of each token id."""

    entries: TableArray | None
    """[rows] the vocabulary's id of each per-layer id; None if they are the same."""

    seed: int
    """Seed of the random choice in `random_subset`."""

    tokenizer: str
    """Fingerprint of the main tokenizer."""

    vocabulary: str
    """SHA-256 of the vocabulary's file."""


def number_densely(by_vocabulary: TableArray) -> tuple[TableArray, TableArray]:
    """Renumbers per-layer ids without gaps, in the same order; special tokens keep their ids.

    Args:
        by_vocabulary: [V] the vocabulary's id of each token id, from `build_table`.

    Returns:
        The table [V] and the vocabulary's id of each of its ids [rows].
    """
    entries = np.union1d(np.arange(len(SPECIAL_TOKENS)), by_vocabulary).astype(np.int32)
    return np.searchsorted(entries, by_vocabulary).astype(np.int32), entries


def rows_of(table: TableArray) -> int:
    """Number of rows a model needs for the ids of a table, with the marks of `attention_guidance`."""
    return max(int(table.max()) + 1, len(SPECIAL_TOKENS))


def table_path(vocab_file: str, strategy: Strategy) -> str:
    """Path of a strategy's table: beside the vocabulary `NAME.json`, `NAME.STRATEGY.npz`."""
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
    """Writes a table beside its vocabulary, by rename, with the seed, tokenizer and vocabulary that made it."""
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
            f"{path} is not a per-layer table ({error}); remove it, and the tool makes it again"
        ) from None


def row_names(vocab_file: str, strategy: Strategy) -> dict[int, str]:
    """Per-layer id -> entry of the vocabulary.

    Raises:
        FileNotFoundError, ValueError: see `load_vocabulary` and `read_table`.
    """
    text_of = {number: text for text, number in load_vocabulary(vocab_file).items()}
    stored = read_table(vocab_file, strategy)
    if stored is None or stored.entries is None:
        return text_of
    return {row: text_of.get(entry, "") for row, entry in enumerate(stored.entries.tolist())}


def load_per_layer_table(strategy: Strategy, *, tokenizer: Tokenizer, vocab_file: str | None) -> TableArray:
    """Loads the table from which training computes per-layer ids, int32 [V]; `identity` needs no file.

    For `attention_guidance` the table is not enough, since some ids depend on the position: a training run must read
    the aligned dataset instead, and a prompt goes through `per_layer_ids.document_ids`.

    Raises:
        FileNotFoundError: the vocabulary or the table is missing.
        ValueError: the table was made for another tokenizer or another version of the vocabulary.
    """
    if strategy == "identity":
        return np.arange(tokenizer.vocab_size, dtype=np.int32)
    if vocab_file is None:
        raise ValueError(f"--per-layer-strategy {strategy} needs --per-layer-vocab-file")
    load_vocabulary(vocab_file)
    path = table_path(vocab_file, strategy)
    remedy = f"make it with: python tools/preprocess_per_layer_data.py ... --per-layer-strategy {strategy}"
    stored = read_table(vocab_file, strategy)
    if stored is None:
        raise FileNotFoundError(f"per-layer table not found: {path}; {remedy}")
    if stored.tokenizer != tokenizer.fingerprint():
        raise ValueError(
            f"{path} is for the tokenizer {stored.tokenizer}, this run's is {tokenizer.fingerprint()}; {remedy}"
        )
    if stored.vocabulary != sha256_of(vocab_file):
        raise ValueError(f"{path} was made from another version of {vocab_file}; {remedy}")
    return stored.table
