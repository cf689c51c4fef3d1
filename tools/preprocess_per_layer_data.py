"""Build the data for per-layer embeddings: the dataset of per-layer ids, their vocabulary, and the table of ids.

The dataset has one per-layer id for each token; the table maps token ids to per-layer ids. The tool reads the data that
tools/preprocess_data.py has tokenized (OUTPUT_PREFIX_KEY_document). It writes the dataset to
PER_LAYER_OUTPUT_PREFIX_KEY_document.bin/.idx/.json, and the table to the directory of the vocabulary file. An existing
vocabulary file is used unchanged; for a held-out set, give the vocabulary file of the training set.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config.command_line.field_checks import check_at_least
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.files.console import token_progress
from megatron_ext.data.indexed.indexed_files import Index, bin_path, idx_path
from megatron_ext.data.indexed.manifest import check_dataset, read_manifest, sha256_of, write_manifest
from megatron_ext.data.indexed.same_file import refuse_same_file
from megatron_ext.data.per_layer.ngrams import check_vocabulary
from megatron_ext.data.per_layer.per_layer_ids import count_tokens, write_aligned
from megatron_ext.data.per_layer.per_layer_table import (
    number_densely,
    read_table,
    rows_of,
    save_table,
    table_path,
)
from megatron_ext.data.per_layer.per_layer_vocab import (
    SPECIAL,
    TableArray,
    build_table,
    build_vocabulary,
    load_vocabulary,
    save_vocabulary,
    token_forms,
)
from megatron_ext.data.per_layer.strategies import NGRAM_TOKENS, WITHOUT_VOCABULARY, Strategy
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer

DEFAULT_VOCAB_SIZE = 10_000
_MARKS = ("<|layer_start|>", "<|attention|>", "<|layer_end|>")


@dataclass(frozen=True, kw_only=True)
class PerLayerDataConfig:
    """Flags for the tokenized data to read, and the per-layer data to write."""

    input: tuple[str, ...] = ()
    """Text files from which the tokenized data was made. They are recorded in the manifest but not read."""

    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON lines, as given to tools/preprocess_data.py."""

    output_prefix: str
    """Prefix of the tokenized data, as given to tools/preprocess_data.py."""

    per_layer_output_prefix: str
    """Prefix of the per-layer data to write."""

    per_layer_vocab_file: str | None = None
    """JSON file of the per-layer vocabulary. An existing file is used, a missing one is created. Not needed with
    --per-layer-strategy identity, bigram_hash and trigram_hash.
    """

    per_layer_vocab_size: int | None = None
    """Largest number of entries in the per-layer vocabulary, including special tokens. Default: 10000, or the size of
    the existing vocabulary file.
    """

    per_layer_strategy: Strategy = "syntax_focus"
    """Strategy that maps token ids to per-layer ids. With bigram_hash and trigram_hash the dataset contains the numbers
    of n-grams, which a training run hashes to as many rows as its --per-layer-vocab-size specifies.
    """

    seed: int = 1234
    """Random seed for --per-layer-strategy random_subset."""

    def __post_init__(self) -> None:
        if self.per_layer_strategy not in WITHOUT_VOCABULARY and self.per_layer_vocab_file is None:
            raise ValueError(
                f"--per-layer-strategy {self.per_layer_strategy}: requires --per-layer-vocab-file"
            )
        check_at_least(self, 1, "per_layer_vocab_size")
        refuse_same_file("--input", [(path, path) for path in self.input])
        if self.per_layer_output_prefix == self.output_prefix:
            raise ValueError(
                f"--per-layer-output-prefix {self.output_prefix}: would overwrite --output-prefix; "
                "give another prefix"
            )


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig(TokenizerConfig):
    """Flags for the tokenizer that made the tokenized data, and its files."""

    @classmethod
    def missing(cls, given: Mapping[str, Any]) -> list[str]:
        """Returns an empty list: `__post_init__` may still find merges.txt, and checks the other flags."""
        return []

    def __post_init__(self) -> None:
        # As in docs/design/per_layer_embedding.md, merges.txt is found beside vocab.json if it is not given.
        if self.tokenizer_type == "GPT2BPETokenizer" and self.vocab_file and self.merge_file is None:
            beside = self.vocab_file.removesuffix("vocab.json") + "merges.txt"
            if self.vocab_file.endswith("vocab.json") and Path(beside).is_file():
                object.__setattr__(self, "merge_file", beside)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PerLayerDataFlags:
    """Flags of this tool."""

    per_layer_data: PerLayerDataConfig
    tokenizer: VocabularyConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the vocabulary and the table, and writes one aligned dataset per key."""
    flags = parse(
        PerLayerDataFlags,
        argv,
        prog="tools/preprocess_per_layer_data.py",
        description=str(__doc__),
        example="python tools/preprocess_per_layer_data.py --input train.jsonl --output-prefix data/train"
        " --per-layer-output-prefix data/train_per_layer --vocab-file data/vocab.json --merge-file data/merges.txt"
        " --per-layer-vocab-file data/per_layer_vocab.json --per-layer-vocab-size 5000",
    )
    config = flags.per_layer_data
    sources = {key: f"{config.output_prefix}_{key}_document" for key in config.json_keys}
    for source in sources.values():
        _require_tokenized(source, config)
    tokenizer = build_tokenizer(flags.tokenizer)
    indices = {key: check_dataset(source, tokenizer) for key, source in sources.items()}
    table, vocab_size = _make_table(config, tokenizer, list(indices.values()))
    for key, index in indices.items():
        _write(config, key, index, table, tokenizer, vocab_size)


def _require_tokenized(source: str, config: PerLayerDataConfig) -> None:
    """Raises `FileNotFoundError` if the tokenized data is missing; the message shows the command that makes it."""
    if Path(bin_path(source)).is_file() and Path(idx_path(source)).is_file():
        return
    keys = f" --json-keys {' '.join(config.json_keys)}" if config.json_keys != ("text",) else ""
    raise FileNotFoundError(
        f"tokenized data not found: {bin_path(source)} and .idx; make it with: python tools/preprocess_data.py"
        f" --input {' '.join(config.input) or 'FILE'}{keys} --output-prefix {config.output_prefix} --append-eod ..."
    )


def _make_table(
    config: PerLayerDataConfig, tokenizer: Tokenizer, indices: list[Index]
) -> tuple[TableArray, int]:
    """Returns the table [V], which maps token ids to per-layer ids, and the number of per-layer ids.

    The vocabulary and the table are written if their files do not exist yet.
    """
    path, strategy = config.per_layer_vocab_file, config.per_layer_strategy
    if strategy in NGRAM_TOKENS:
        check_vocabulary(strategy, tokenizer.vocab_size)
    if strategy in WITHOUT_VOCABULARY:
        return np.arange(tokenizer.vocab_size, dtype=np.int32), tokenizer.vocab_size
    assert path is not None
    vocabulary = _vocabulary(config, path, tokenizer, indices)
    table = _stored_table(config, path, tokenizer)
    if table is None:
        by_vocabulary = build_table(strategy, token_forms(tokenizer), vocabulary, seed=config.seed)
        table, entries = number_densely(by_vocabulary)
        save_table(
            path,
            strategy,
            table,
            tokenizer_fingerprint=tokenizer.fingerprint(),
            seed=config.seed,
            entries=entries,
        )
    marks = [SPECIAL[mark] for mark in _MARKS] if strategy == "attention_guidance" else []
    used, rows = len(np.union1d(table, marks)), rows_of(table)
    print(
        f"{table_path(path, strategy)}: maps {len(table):,} token ids to per-layer ids, {used:,} of {rows:,} used"
    )
    return table, rows


def _vocabulary(
    config: PerLayerDataConfig, path: str, tokenizer: Tokenizer, indices: list[Index]
) -> dict[str, int]:
    """Returns the vocabulary, which maps texts to per-layer ids.

    The vocabulary is read from its file; if the file does not exist, the vocabulary is built from the tokens and
    written.
    """
    size = config.per_layer_vocab_size
    if Path(path).exists():
        vocabulary = load_vocabulary(path)
        if size is not None and len(vocabulary) > size:
            raise ValueError(
                f"{path} has {len(vocabulary)} entries, more than --per-layer-vocab-size {size};"
                f" leave the flag out, or remove the file to rebuild it"
            )
        print(f"{path}: used unchanged, {len(vocabulary):,} entries")
        return vocabulary
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    with token_progress("counting", sum(index.num_tokens for index in indices)) as progress:
        for index in indices:
            counts += count_tokens(index, tokenizer.vocab_size, progress)
    vocabulary = build_vocabulary(
        token_forms(tokenizer), counts, DEFAULT_VOCAB_SIZE if size is None else size
    )
    save_vocabulary(path, vocabulary)
    print(f"{path}: made from {counts.sum():,} tokens, {len(vocabulary):,} entries")
    return vocabulary


def _stored_table(config: PerLayerDataConfig, path: str, tokenizer: Tokenizer) -> TableArray | None:
    """Returns the stored table if it belongs to this vocabulary and tokenizer, else None."""
    # A stored table is never rebuilt: other datasets may have been made with it.
    stored = read_table(path, config.per_layer_strategy)
    if stored is None or (stored.tokenizer, stored.vocabulary) != (tokenizer.fingerprint(), sha256_of(path)):
        return None
    if config.per_layer_strategy == "random_subset" and stored.seed != config.seed:
        raise ValueError(
            f"--seed {config.seed}: {table_path(path, config.per_layer_strategy)} was made with --seed {stored.seed};"
            f" give that seed, or another --per-layer-vocab-file"
        )
    return stored.table


def _write(
    config: PerLayerDataConfig,
    key: str,
    index: Index,
    table: TableArray,
    tokenizer: Tokenizer,
    vocab_size: int,
) -> None:
    """Writes the aligned dataset of one key, and its manifest."""
    output = f"{config.per_layer_output_prefix}_{key}_document"
    begin = time.perf_counter()
    with token_progress("per-layer ids", index.num_tokens) as progress:
        write_aligned(
            index,
            output,
            table,
            config.per_layer_strategy,
            eod=tokenizer.eod,
            per_layer_vocab_size=vocab_size,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    source_manifest = read_manifest(index.prefix) or {}
    per_layer: dict[str, Any] = {
        "strategy": config.per_layer_strategy,
        # Numbers of n-grams say nothing about the number of rows.
        "vocab_size": None if config.per_layer_strategy in NGRAM_TOKENS else vocab_size,
        "source": index.prefix,
        "source_checksum": source_manifest.get("checksums", {}).get("bin"),
    }
    if config.per_layer_strategy not in WITHOUT_VOCABULARY and config.per_layer_vocab_file is not None:
        per_layer["vocab_file"] = config.per_layer_vocab_file
        per_layer["vocab_checksum"] = sha256_of(config.per_layer_vocab_file)
    write_manifest(
        output,
        tool="preprocess_per_layer_data",
        tokenizer=tokenizer.describe(),
        inputs=list(config.input),
        extra={"per_layer": per_layer},
    )
    print(
        f"{output}.bin/.idx: {index.num_documents:,} documents, {index.num_tokens:,} per-layer ids"
        f" ({index.num_tokens / max(seconds, 1e-9) / 1e6:.0f} million tokens/s)"
    )


if __name__ == "__main__":
    run_main(main)
