"""A preprocessing tool like Megatron-LM's, written for benchmarks/data.py from its documentation, without its code.

    python benchmarks/peers/pool_tool.py INPUT OUTPUT_PREFIX TOKENIZER_DIR WORKERS

A `multiprocessing.Pool` parses and encodes lines, 32 at a time; this process adds the documents to megatron-core's
`IndexedDatasetBuilder`. Tokenizer and builder, which take most of the time, are megatron-core's own, as in
Megatron-LM's tool. The rest of that tool (flags, partitions, progress lines) is missing.
"""

import json
import multiprocessing
import sys

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

_LINES_PER_TASK = 32
_tokenizer: HuggingFaceTokenizer


def _load(directory: str) -> None:
    global _tokenizer
    _tokenizer = HuggingFaceTokenizer(directory, use_fast=True, include_special_tokens=True)


def _encode(line: str) -> list[int]:
    ids: list[int] = _tokenizer.text_to_ids(json.loads(line)["text"])
    return [*ids, _tokenizer.eod] if ids else ids


def main(source: str, prefix: str, directory: str, workers: int) -> None:
    """Writes the dataset PREFIX.bin and PREFIX.idx."""
    _load(directory)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(_tokenizer.vocab_size))
    with open(source, encoding="utf-8") as lines, multiprocessing.Pool(workers, _load, (directory,)) as pool:
        for ids in pool.imap(_encode, lines, _LINES_PER_TASK):
            builder.add_document(ids, [len(ids)] if ids else [])
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
