"""Checks that a per-layer dataset belongs to a main dataset: it must have the same documents and sequence lengths."""

from pathlib import Path

import numpy as np

from megatron_ext.data.indexed.indexed_files import IntArray, bin_path, chunks, idx_path, open_index, release
from megatron_ext.data.indexed.manifest import check_dataset, read_manifest

_REMEDY = "make it with: python tools/preprocess_per_layer_data.py"


def require_per_layer_files(prefix: str, per_layer_prefix: str) -> None:
    """Raises an error if the per-layer data of the dataset `prefix` is missing; the error shows the command to run.

    Raises:
        FileNotFoundError: `.bin` or `.idx` is missing.
    """
    for path in (bin_path(per_layer_prefix), idx_path(per_layer_prefix)):
        if not Path(path).is_file():
            main, aligned = _tool_prefix(prefix), _tool_prefix(per_layer_prefix)
            raise FileNotFoundError(
                f"Per-layer data file not found: {path}; {_REMEDY} --output-prefix {main}"
                f" --per-layer-output-prefix {aligned} --per-layer-vocab-file FILE --per-layer-strategy STRATEGY ..."
            )


def check_aligned(
    prefix: str, per_layer_prefix: str, *, strategy: str | None = None, vocab_size: int | None = None
) -> None:
    """Compares a per-layer dataset with its main dataset; reads both index files piece by piece, and no tokens.

    Args:
        prefix: prefix of the main dataset.
        per_layer_prefix: prefix of the per-layer dataset.
        strategy: the run's `--per-layer-strategy`; compared with the strategy that the manifest records, if any.
        vocab_size: the run's `--per-layer-vocab-size`; the vocabulary size in the manifest must not be larger.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the datasets differ; the message names the difference and both values.
    """
    main, aligned = open_index(prefix), check_dataset(per_layer_prefix)
    pairs = (
        ("documents", main.num_documents, aligned.num_documents),
        ("sequences", main.num_sequences, aligned.num_sequences),
        ("tokens", main.num_tokens, aligned.num_tokens),
    )
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise _mismatch(prefix, per_layer_prefix, f"it has {theirs} {name} instead of {ours}")
    for name, a, b in (
        ("the length of sequence", main.lengths, aligned.lengths),
        ("the first sequence of document", main.document_indices, aligned.document_indices),
    ):
        at = _first_difference(a, b)
        if at is not None:
            raise _mismatch(prefix, per_layer_prefix, f"{name} {at} is {b[at]} instead of {a[at]}")
    _check_manifests(prefix, per_layer_prefix, strategy, vocab_size)


def _check_manifests(
    prefix: str, per_layer_prefix: str, strategy: str | None, vocab_size: int | None
) -> None:
    """Compares what the two manifests record; skips whatever is not recorded."""
    per_layer = (read_manifest(per_layer_prefix) or {}).get("per_layer", {})
    made_from = per_layer.get("source_checksum")
    checksum = (read_manifest(prefix) or {}).get("checksums", {}).get("bin")
    if None not in (made_from, checksum) and made_from != checksum:
        raise _mismatch(prefix, per_layer_prefix, "the main data was made again after the per-layer data")
    made_with = per_layer.get("strategy")
    if strategy is not None and made_with not in (None, strategy):
        raise ValueError(
            f"--per-layer-strategy {strategy}: {per_layer_prefix} was made with {made_with}; pass "
            f"{made_with}, or per-layer data made with {strategy}"
        )
    entries = per_layer.get("vocab_size")
    if vocab_size is not None and entries is not None and entries > vocab_size:
        raise ValueError(
            f"--per-layer-vocab-size {vocab_size} is too small: {per_layer_prefix} has {entries} ids;"
            f" give at least that, or leave the flag out"
        )


def _mismatch(prefix: str, per_layer_prefix: str, what: str) -> ValueError:
    """Makes the error for two datasets that do not belong together."""
    return ValueError(f"{per_layer_prefix} is not aligned with {prefix}: {what}; {_REMEDY} ...")


def _first_difference(a: IntArray, b: IntArray) -> int | None:
    """Returns the index of the first difference between two arrays of equal length; None if they are equal."""
    for begin, end in chunks(len(a)):
        differs = a[begin:end] != b[begin:end]
        if differs.any():
            return begin + int(np.argmax(differs))
        release(a)
        release(b)
    return None


def _tool_prefix(prefix: str) -> str:
    """Returns a dataset's prefix without `_KEY_document`: the `--output-prefix` that the tool was given."""
    head, _, last = prefix.rpartition("_")
    return head.rpartition("_")[0] if last == "document" and "_" in head else prefix
