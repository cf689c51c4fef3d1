"""Verifies a whole dataset: every pointer, token id and checksum, and every per-layer id.

A training run makes only a quick check (`manifest.check_dataset`); this module reads all of the data once or twice.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.indexed.indexed_files import Index, bin_path, check_contiguous, idx_path
from megatron_ext.data.indexed.manifest import check_dataset, read_manifest, sha256_of
from megatron_ext.data.per_layer.alignment import check_aligned
from megatron_ext.data.per_layer.per_layer_ids import check_bounds, derive
from megatron_ext.data.per_layer.per_layer_table import read_table, table_path
from megatron_ext.data.per_layer.per_layer_vocab import load_vocabulary
from megatron_ext.data.per_layer.strategies import STRATEGIES, WITHOUT_VOCABULARY

_CHUNK_TOKENS = 1 << 20


def verify_dataset(
    prefix: str,
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
    source: str | None = None,
) -> list[str]:
    """Checks everything in a dataset that can be checked with the files at hand.

    Args:
        prefix: path of the dataset without `.bin` or `.idx`.
        tokenizer_fingerprint: compared with the fingerprint in the manifest, if both are known.
        vocab_size: every token id must be below it; used if the manifest records no size.
        source: prefix of the main dataset, for per-layer data; the default is the dataset that the manifest names.

    Returns:
        One line for each passed check, and one line, with the reason, for each check that was not possible.

    Raises:
        FileNotFoundError, ValueError: the dataset has an error; the message names the first one found.
    """
    index = check_dataset(prefix, tokenizer_fingerprint)
    check_contiguous(index)
    lines = [
        f"index: {index.num_documents:,} documents, {index.num_sequences:,} sequences, {index.num_tokens:,} tokens"
    ]
    manifest = read_manifest(prefix)
    per_layer = (manifest or {}).get("per_layer")
    if manifest is None:
        lines.append("manifest: none, so checksums and tokenizer are not checked")
    else:
        lines.append(_check_manifest(index, manifest))
        recorded = (per_layer or manifest.get("tokenizer") or {}).get("vocab_size")
        # The numbers of n-grams have no bound.
        vocab_size = recorded if per_layer or recorded is not None else vocab_size
    lines.append(_check_tokens(index, vocab_size))
    source = source if source is not None else (per_layer or {}).get("source")
    if source is not None:
        lines += _check_per_layer(index, source, per_layer or {})
    return lines


def _check_manifest(index: Index, manifest: dict[str, Any]) -> str:
    """Compares counts, token type and checksums with the manifest."""
    counts = {"documents": index.num_documents, "sequences": index.num_sequences, "tokens": index.num_tokens}
    if manifest["counts"] != counts or manifest["dtype"] != index.dtype.name:
        raise ValueError(
            f"{index.prefix}: manifest and index disagree: the manifest has counts "
            f"{manifest['counts']} and token type "
            f"{manifest['dtype']}, the index has counts {counts} and token type {index.dtype.name}"
        )
    for name, path in (("bin", bin_path(index.prefix)), ("idx", idx_path(index.prefix))):
        actual = sha256_of(path)
        if actual != manifest["checksums"][name]:
            raise ValueError(
                f"{path}: its checksum is {actual}, but the manifest records {manifest['checksums'][name]}; the file "
                "has changed or is damaged"
            )
    fingerprint = (manifest.get("tokenizer") or {}).get("fingerprint", "unknown")
    return f"manifest: counts and checksums agree; tokenizer {fingerprint}"


def _check_tokens(index: Index, vocab_size: int | None) -> str:
    """Finds the smallest and the largest token id, and checks both against the vocabulary if its size is known."""
    low, high = None, None
    for chunk in index.token_chunks(_CHUNK_TOKENS):
        if vocab_size is not None:
            check_bounds(index, chunk, vocab_size)
        low = int(chunk.min()) if low is None else min(low, int(chunk.min()))
        high = int(chunk.max()) if high is None else max(high, int(chunk.max()))
    if low is not None and low < 0:
        raise ValueError(f"{bin_path(index.prefix)} holds the negative token id {low}")
    known = "the vocabulary's size is not known" if vocab_size is None else f"all below {vocab_size:,}"
    return "tokens: none" if low is None else f"tokens: ids {low:,} to {high:,}, {known}"


def _check_per_layer(index: Index, source: str, per_layer: dict[str, Any]) -> list[str]:
    """Checks that per-layer data has the documents of the main dataset, and that each id is the table's value for its
    token.
    """
    if not Path(idx_path(source)).is_file():
        return [
            f"alignment: not checked, because the main data {source} was not found (give its prefix with --source)"
        ]
    check_aligned(source, index.prefix)
    aligned = f"alignment: documents and lengths equal those of {source}"
    strategy, vocab_file = per_layer.get("strategy"), per_layer.get("vocab_file")
    if strategy not in STRATEGIES:
        return [aligned, "per-layer ids: not checked, because the manifest names no strategy"]
    main = check_dataset(source)
    tokenizer = (read_manifest(index.prefix) or {}).get("tokenizer") or {}
    table: np.ndarray[Any, Any]
    if strategy in WITHOUT_VOCABULARY:
        table = np.arange(per_layer.get("vocab_size") or tokenizer["vocab_size"])
    else:
        path = table_path(str(vocab_file), strategy)
        stored = read_table(str(vocab_file), strategy)
        if stored is None:
            return [aligned, f"per-layer ids: not checked, because their table {path} was not found"]
        load_vocabulary(str(vocab_file))
        table = stored.table
        made_for = stored.tokenizer, stored.vocabulary
        if made_for != (tokenizer.get("fingerprint"), per_layer.get("vocab_checksum")):
            return [
                aligned,
                f"per-layer ids: not checked, because {path} was made from another vocabulary or tokenizer",
            ]
    position = 0
    with open(bin_path(index.prefix), "rb") as stream:
        for expected in derive(main, table.astype(index.dtype), strategy, eod=tokenizer["eod"]):
            ids = np.fromfile(stream, dtype=index.dtype, count=len(expected))
            wrong = expected != ids
            if wrong.any():
                at = int(np.argmax(wrong))
                raise ValueError(
                    f"{bin_path(index.prefix)}: the per-layer id of token {position + at} is {ids[at]},"
                    f" but {strategy} gives {expected[at]}"
                )
            position += len(expected)
    return [aligned, f"per-layer ids: all are what {strategy} gives"]
