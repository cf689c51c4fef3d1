"""Verify, inspect, merge, split and shuffle indexed datasets.

    data.py verify PREFIX ...       check sizes, pointers, ids, checksums and alignment with per-layer data
    data.py inspect PREFIX          show counts, lengths, and one document as text or with per-layer ids
    data.py merge PREFIX ...        concatenate datasets into --output-prefix
    data.py split PREFIX            split into consecutive parts: --output-prefix A B --shares 95 5
    data.py shuffle PREFIX          write the documents in random order to --output-prefix

A PREFIX is the path of a dataset without .bin or .idx. Each command has its own --help.
Exit codes: 0 success, 1 verify found a broken dataset, 2 wrong flag or file.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.corpora.dataset_checks import verify_dataset
from megatron_ext.data.corpora.dataset_rewrite import length_histogram, merge, shuffle, split
from megatron_ext.data.indexed.indexed_files import Index
from megatron_ext.data.indexed.manifest import check_dataset, read_manifest
from megatron_ext.data.indexed.same_file import refuse_same_dataset
from megatron_ext.data.per_layer.alignment import check_aligned, require_per_layer_files
from megatron_ext.data.per_layer.ngrams import tokens_of_ngram
from megatron_ext.data.per_layer.per_layer_table import row_names
from megatron_ext.data.per_layer.strategies import NGRAM_TOKENS
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class OptionalTokenizerConfig(TokenizerConfig):
    """Flags for an optional tokenizer, with which the token ids are checked or decoded."""

    @classmethod
    def missing(cls, given: Mapping[str, Any]) -> list[str]:
        """Returns an empty list, as the tokenizer is optional; `__post_init__` checks the flags that are given."""
        return []

    def __post_init__(self) -> None:
        if self.is_given():
            super().__post_init__()

    def is_given(self) -> bool:
        """Returns whether any tokenizer flag differs from its default."""
        files = (self.tokenizer_model, self.vocab_file, self.merge_file, self.vocab_size)
        return any(files) or self.tokenizer_type != "GPT2BPETokenizer"

    def build(self) -> Tokenizer | None:
        """Builds the tokenizer; returns None if no tokenizer flag is given."""
        return build_tokenizer(self) if self.is_given() else None


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Flags for the datasets to verify."""

    prefix: tuple[str, ...]
    """Prefixes of the datasets to verify. They may also be given first, without --prefix."""

    source: str | None = None
    """For per-layer data: prefix of the main dataset, if it is not at the path in the manifest."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Flags for the dataset to inspect."""

    prefix: str
    """Prefix of the dataset to inspect. It may also be given first, without --prefix."""

    document: int | None = None
    """Index of a document to show, counted from 0; a negative index counts from the end."""

    max_tokens: int = 100
    """Show at most this many tokens of the document."""

    per_layer_data_path: str | None = None
    """Prefix of the aligned per-layer dataset; its ids are shown beside the tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens {self.max_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Flags for the datasets to concatenate."""

    prefix: tuple[str, ...]
    """Prefixes of the datasets to concatenate, in order. They may also be given first, without --prefix."""

    output_prefix: str
    """Prefix of the merged dataset to write."""


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Flags for the dataset to split."""

    prefix: str
    """Prefix of the dataset to split. It may also be given first, without --prefix."""

    output_prefix: tuple[str, ...]
    """Prefixes of the datasets to write; the first gets the first documents, and so on."""

    shares: tuple[float, ...]
    """Proportions in which the documents are divided among the datasets, such as 95 5."""


@dataclass(frozen=True, kw_only=True)
class ShuffleConfig:
    """Flags for the dataset to shuffle."""

    prefix: str
    """Prefix of the dataset to shuffle. It may also be given first, without --prefix."""

    output_prefix: str
    """Prefix of the shuffled dataset to write."""

    seed: int = 1234
    """Random seed for the order. A dataset and its per-layer dataset stay aligned if both use the same seed."""


@dataclass(frozen=True, kw_only=True)
class VerifyFlags:
    """All flags of `verify`."""

    data: VerifyConfig
    tokenizer: OptionalTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class InspectFlags:
    """All flags of `inspect`."""

    data: InspectConfig
    tokenizer: OptionalTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class MergeFlags:
    """All flags of `merge`."""

    data: MergeConfig


@dataclass(frozen=True, kw_only=True)
class SplitFlags:
    """All flags of `split`."""

    data: SplitConfig


@dataclass(frozen=True, kw_only=True)
class ShuffleFlags:
    """All flags of `shuffle`."""

    data: ShuffleConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    if command not in _COMMANDS:
        if command in ("-h", "--help"):
            print(__doc__)
            return 0
        raise ValueError(f"unknown command {command!r}: must be one of {', '.join(_COMMANDS)}")
    flags_type, run, example = _COMMANDS[command]
    rest = arguments[1:]
    if rest and not rest[0].startswith("-"):
        rest = ["--prefix", *rest]
    flags = parse(
        flags_type,
        rest,
        prog=f"tools/data.py {command}",
        description=str(run.__doc__),
        example=f"python tools/data.py {command} {example}",
    )
    return run(flags)


def run_verify(flags: VerifyFlags) -> int:
    """Read each dataset and check sizes, pointers, ids, checksums, tokenizer and alignment with per-layer data."""
    config, tokenizer = flags.data, flags.tokenizer.build()
    broken = 0
    refuse_same_dataset("verify", config.prefix)
    for prefix in config.prefix:
        try:
            lines = verify_dataset(
                prefix,
                tokenizer_fingerprint=tokenizer.fingerprint() if tokenizer else None,
                vocab_size=tokenizer.vocab_size if tokenizer else None,
                source=config.source,
            )
        except (ValueError, OSError) as error:
            broken += 1
            print(f"{prefix}: BROKEN\n  {error}")
            continue
        print(f"{prefix}: ok")
        for line in lines:
            print(f"  {line}")
    return 1 if broken else 0


def run_inspect(flags: InspectFlags) -> int:
    """Show the counts and document lengths of a dataset, and one document (as text if a tokenizer is given)."""
    config, tokenizer = flags.data, flags.tokenizer.build()
    index = check_dataset(config.prefix, tokenizer)
    manifest = read_manifest(config.prefix)
    print(f"{config.prefix}: {index.num_documents:,} documents, {index.num_sequences:,} sequences,")
    print(f"  {index.num_tokens:,} tokens of {index.dtype.name}")
    if manifest is None:
        print("  no manifest")
    else:
        print(f"  made by {manifest['tool']} {manifest['tool_version']} from {_names(manifest['inputs'])}")
        for name in ("tokenizer", "per_layer"):
            if manifest.get(name):
                print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in manifest[name].items()))
    print("  tokens per document:")
    for smallest, documents in length_histogram(index):
        largest = max(2 * smallest - 1, 0)
        bar = "#" * max(1, round(40 * documents / index.num_documents))
        print(f"    {smallest:>11,} to {largest:>11,}  {documents:>13,}  {bar}")
    if config.document is not None:
        _show_document(config, index, tokenizer)
    return 0


def _show_document(config: InspectConfig, index: Index, tokenizer: Tokenizer | None) -> None:
    """Prints the tokens of one document, with their text and their per-layer ids if the flags for these are given."""
    total = index.num_documents
    assert config.document is not None
    if not -total <= config.document < total:
        raise ValueError(
            f"--document {config.document}: must be from {-total} to {total - 1} (negative numbers count from the "
            f"end): {config.prefix} has {total} documents"
        )
    number = config.document % total
    start, end = index.document_starts(number, number + 2).tolist()
    tokens = index.tokens()[start : min(end, start + config.max_tokens)].tolist()
    print(f"document {number}, tokens 0 to {len(tokens) - 1} of {end - start:,}:")
    if tokenizer is not None:
        print(tokenizer.detokenize(tokens))
    if config.per_layer_data_path is None:
        if tokenizer is None:
            print(" ".join(map(str, tokens)))
        return
    require_per_layer_files(config.prefix, config.per_layer_data_path)
    check_aligned(config.prefix, config.per_layer_data_path)
    aligned = check_dataset(config.per_layer_data_path)
    made = (read_manifest(config.per_layer_data_path) or {}).get("per_layer") or {}
    names = _per_layer_names(made)
    for token, per_layer in zip(tokens, aligned.tokens()[start : start + len(tokens)].tolist(), strict=True):
        text = repr(tokenizer.detokenize([token])) if tokenizer is not None else ""
        if made.get("strategy") in NGRAM_TOKENS:
            print(f"  {token:>8} {text:<24} n-gram {' '.join(map(str, tokens_of_ngram(per_layer)))}")
        else:
            print(f"  {token:>8} {text:<24} {per_layer:>8} {names.get(per_layer, '')}")


def _per_layer_names(made: Mapping[str, Any]) -> dict[int, str]:
    """Returns the text of each per-layer id, from the vocabulary that the manifest names; empty if there is none.

    Args:
        made: the section `per_layer` of the manifest.
    """
    try:
        return row_names(made["vocab_file"], made["strategy"]) if made.get("vocab_file") else {}
    except FileNotFoundError:
        return {}


def _names(inputs: list[dict[str, Any]]) -> str:
    """Returns the names of the first three input files, and the number of further files."""
    paths = [entry["path"] for entry in inputs]
    return (
        ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
        if paths
        else "unnamed input"
    )


def run_merge(flags: MergeFlags) -> int:
    """Concatenate datasets that have the same token type and tokenizer."""
    merge(flags.data.prefix, flags.data.output_prefix)
    return _report(flags.data.output_prefix)


def run_split(flags: SplitFlags) -> int:
    """Split a dataset into consecutive parts of whole documents; for random parts, shuffle it first."""
    split(flags.data.prefix, flags.data.output_prefix, flags.data.shares)
    return _report(*flags.data.output_prefix)


def run_shuffle(flags: ShuffleFlags) -> int:
    """Write a dataset's documents in random order."""
    shuffle(flags.data.prefix, flags.data.output_prefix, seed=flags.data.seed)
    return _report(flags.data.output_prefix)


def _report(*outputs: str) -> int:
    """Prints the size of each written dataset."""
    for output in outputs:
        index = check_dataset(output)
        print(f"{output}.bin/.idx: {index.num_documents:,} documents, {index.num_tokens:,} tokens")
    return 0


_COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int], str]] = {
    "verify": (VerifyFlags, run_verify, "data/train_text_document"),
    "inspect": (
        InspectFlags,
        run_inspect,
        "data/train_text_document --document 0 --vocab-file vocab.json ...",
    ),
    "merge": (MergeFlags, run_merge, "data/a data/b --output-prefix data/both"),
    "split": (SplitFlags, run_split, "data/all --output-prefix data/train data/test --shares 95 5"),
    "shuffle": (ShuffleFlags, run_shuffle, "data/all --output-prefix data/shuffled --seed 1"),
}


if __name__ == "__main__":
    run_main(main)
