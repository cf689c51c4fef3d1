#!/usr/bin/env python3
"""Measures the speed of making per-layer data (one per-layer id per token), on one core, for every strategy.

    python benchmarks/per_layer_data.py --tokens 100000000

The corpus of `tools/build_corpus.py` is tokenized once with a byte-level BPE trained on it, and repeated to the given
size; this is not timed. Three things are timed, in one process on one core: counting the tokens for the vocabulary,
writing each aligned dataset (with fsync), and computing the checksums in its manifest. For comparison, the same mapping
is done token by token in Python on a hundredth of the data. Rates are given by wall time and by CPU time, which differ
on a busy machine.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.corpora.python_corpus import write_corpus
from megatron_ext.data.indexed.indexed_files import Index, open_index, write_index
from megatron_ext.data.indexed.manifest import write_manifest
from megatron_ext.data.per_layer.per_layer_ids import count_tokens, write_aligned
from megatron_ext.data.per_layer.per_layer_vocab import (
    TableArray,
    build_table,
    build_vocabulary,
    token_forms,
)
from megatron_ext.data.per_layer.strategies import STRATEGIES, Strategy
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the size of the benchmark."""

    tokens: int = 100_000_000
    """Minimum number of tokens in the dataset; the corpus is repeated until it is reached."""

    vocab_size: int = 32_768
    """Vocabulary size of the tokenizer."""

    per_layer_vocab_size: int = 10_000
    """Number of entries in the per-layer vocabulary."""

    corpus_bytes: int = 8_000_000
    """Bytes of real text before repetition."""


def main() -> None:
    """Builds the dataset, times every strategy and prints one table."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/per_layer_data.py",
        description=str(__doc__),
        example="python benchmarks/per_layer_data.py",
    )
    if hasattr(os, "sched_setaffinity"):  # run on one core only
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, index = _dataset(config, folder)
        _print(config, folder, tokenizer, index)


def _dataset(config: BenchmarkConfig, folder: str) -> tuple[Tokenizer, Index]:
    """Returns a tokenizer trained on the corpus, and the corpus tokenized and repeated."""
    write_corpus(f"{folder}/train.jsonl", f"{folder}/held_out.jsonl", max_bytes=config.corpus_bytes)
    lines = Path(f"{folder}/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=config.vocab_size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.save_model(folder)
    tokenizer = build_tokenizer(
        TokenizerConfig(vocab_file=f"{folder}/vocab.json", merge_file=f"{folder}/merges.txt")
    )
    documents = [np.array([*ids, tokenizer.eod], dtype=np.uint16) for ids in tokenizer.tokenize_batch(texts)]
    once = np.concatenate(documents)
    lengths = np.array([len(document) for document in documents])
    repeat = -(-config.tokens // len(once))
    with open(f"{folder}/d.bin", "wb") as stream:
        stream.writelines(once.data for _ in range(repeat))
    write_index(f"{folder}/d.idx", np.uint16, np.tile(lengths, repeat), np.arange(len(lengths) * repeat + 1))
    return tokenizer, open_index(f"{folder}/d")


def _print(config: BenchmarkConfig, folder: str, tokenizer: Tokenizer, index: Index) -> None:
    """Times every pass and prints the table."""
    total = index.num_tokens
    title = f"per-layer data: {total / 1e6:.0f} million tokens, {index.num_documents:,} documents, one core"
    table = Table("pass", "million tokens/s", "by CPU time", "with checksums", "by CPU time", title=title)
    counts = count_tokens(index, tokenizer.vocab_size)
    counting = _seconds(lambda: count_tokens(index, tokenizer.vocab_size))
    table.add_row("vocabulary: counting", *_rates(total, counting))
    forms = token_forms(tokenizer)
    vocabulary = build_vocabulary(forms, counts, config.per_layer_vocab_size)
    for strategy in STRATEGIES:
        mapping = build_table(strategy, forms, vocabulary)
        rows = int(mapping.max()) + 1

        def write(mapping: TableArray = mapping, strategy: Strategy = strategy, rows: int = rows) -> None:
            write_aligned(
                index, f"{folder}/a", mapping, strategy, eod=tokenizer.eod, per_layer_vocab_size=rows
            )

        writing = _seconds(write)
        hashing = _seconds(lambda: write_manifest(f"{folder}/a", tool="benchmark", tokenizer=None, inputs=[]))
        table.add_row(strategy, *_rates(total, writing), *_rates(total, writing + hashing))
    some = index.tokens()[: total // 100]
    by_token = {
        token: int(value) for token, value in enumerate(build_table("syntax_focus", forms, vocabulary))
    }

    def one_by_one() -> None:
        np.array([by_token[int(token)] for token in some], dtype=np.uint16).tofile(f"{folder}/b")

    table.add_row("one token at a time", *_rates(len(some), _seconds(one_by_one)))
    Console(width=110).print(table)


def _seconds(action: Callable[[], object]) -> np.ndarray:
    """Returns wall time and CPU time of one call."""
    begin = np.array([time.perf_counter(), time.process_time()])
    action()
    return np.array([time.perf_counter(), time.process_time()]) - begin


def _rates(tokens: int, seconds: np.ndarray) -> list[str]:
    """Returns million tokens per second, by wall time and by CPU time."""
    return [f"{tokens / second / 1e6:.1f}" for second in seconds]


if __name__ == "__main__":
    run_main(main)
