"""Computes the per-layer ids of a whole tokenized dataset, and writes them as an aligned dataset in one pass.

    ids[i] = table[tokens[i]]

With the strategy `attention_guidance`, the id also depends on the position in the document (0 is the first token).
Each line gives an id and the condition for it; the first condition that holds decides:

    <|layer_end|>     the token is the document's end-of-document token
    <|layer_start|>   position 0
    <|attention|>     positions 10, 20, 30, ...
    table[tokens[i]]  all other positions

With `bigram_hash` and `trigram_hash`, the dataset has the number of the n-gram that ends at each token (see `ngrams`),
from which training computes rows. No n-gram reaches across the beginning of a document or an end-of-document token.

The aligned dataset has the same documents and sequence lengths as its source, so the same sample indices serve both.
All data is streamed, so memory does not grow with the dataset. No text is read or tokenized.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed.indexed_files import (
    Index,
    IntArray,
    bin_path,
    check_contiguous,
    idx_path,
    optimal_dtype,
    write_index,
)
from megatron_ext.data.indexed.manifest import manifest_path, write_atomically
from megatron_ext.data.per_layer.ngrams import ngram_numbers, starts_after
from megatron_ext.data.per_layer.per_layer_vocab import SPECIAL, TableArray
from megatron_ext.data.per_layer.strategies import NGRAM_TOKENS, Strategy

ATTENTION_PERIOD = 10
_CHUNK_TOKENS = 1 << 18  # 256K tokens: the work arrays stay in the cache
_CHUNK_DOCUMENTS = 1 << 18

ReportTokens = Callable[[int], None]


def count_tokens(
    index: Index, vocab_size: int, progress: ReportTokens = lambda tokens: None
) -> npt.NDArray[np.int64]:
    """Counts how often each token id occurs in a dataset, int64 [V].

    Args:
        index: the tokenized dataset.
        vocab_size: V, the vocabulary size of the main tokenizer.
        progress: called after every chunk with the number of tokens in it.

    Raises:
        ValueError: a token id is not below V.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in index.token_chunks(_CHUNK_TOKENS):
        check_bounds(index, chunk, vocab_size)
        counts += np.bincount(chunk, minlength=vocab_size)
        progress(len(chunk))
    return counts


def write_aligned(
    index: Index,
    output_prefix: str,
    table: TableArray,
    strategy: Strategy,
    *,
    eod: int,
    per_layer_vocab_size: int,
    progress: ReportTokens = lambda tokens: None,
) -> None:
    """Writes the per-layer ids of a dataset as an aligned dataset; both files are written atomically, the index last.

    The index and manifest of an older dataset with the same prefix are removed before its `.bin` is replaced, so an old
    index never points at new ids.

    Args:
        index: the tokenized dataset.
        output_prefix: path of the aligned dataset without `.bin` or `.idx`.
        table: [V] per-layer id of each token id.
        strategy: the strategy that the table was built for; `attention_guidance` also uses positions.
        eod: end-of-document token id of the main tokenizer.
        per_layer_vocab_size: number of per-layer ids; decides the integer type of the file (see `id_type`).
        progress: called after every chunk with the number of tokens in it.

    Raises:
        ValueError: a token id is not below V, or the dataset's sequences are not stored without gaps.
    """
    check_contiguous(index)
    dtype = id_type(strategy, per_layer_vocab_size)
    with (
        write_atomically(idx_path(output_prefix)) as idx_temporary,
        write_atomically(bin_path(output_prefix)) as bin_temporary,
    ):
        with bin_temporary.open("wb") as stream:
            for ids in derive(index, table.astype(dtype), strategy, eod=eod):
                stream.write(ids.data)
                progress(len(ids))
            stream.flush()
            os.fsync(stream.fileno())
        write_index(idx_temporary, dtype, index.lengths, index.document_indices)
        for stale in (idx_path(output_prefix), manifest_path(output_prefix)):
            if os.path.exists(stale):
                os.unlink(stale)


def id_type(strategy: Strategy, per_layer_vocab_size: int) -> type[np.generic]:
    """Returns the integer type of an aligned dataset: int64 for n-grams, whose ids use up to 63 bits."""
    return np.int64 if strategy in NGRAM_TOKENS else optimal_dtype(per_layer_vocab_size)


def derive(index: Index, table: IntArray, strategy: Strategy, *, eod: int) -> Iterator[IntArray]:
    """Yields the per-layer ids of a tokenized dataset, chunk by chunk, in the integer type of `table`.

    Args:
        index: the tokenized dataset.
        table: [V] per-layer id of each token id.
        strategy: the strategy that the table was built for; `attention_guidance` also uses positions.
        eod: end-of-document token id of the main tokenizer.

    Raises:
        ValueError: a token id is not below V.
    """
    begin, ngrams = 0, _Ngrams(strategy, eod) if strategy in NGRAM_TOKENS else None
    for chunk in index.token_chunks(_CHUNK_TOKENS):
        check_bounds(index, chunk, len(table))
        if ngrams is not None:
            yield ngrams.numbers(chunk, _begins(index, begin, len(chunk)))
            index.release()
            begin += len(chunk)
            continue
        ids = np.take(table, chunk, mode="clip")  # bounds are checked; "clip" skips a second check
        if strategy == "attention_guidance":
            _mark(index, ids, chunk, begin, eod)
            index.release()
        begin += len(chunk)
        yield ids


class _Ngrams:
    """Computes the numbers of n-grams in consecutive chunks of tokens; n-grams may reach back into earlier chunks."""

    def __init__(self, strategy: Strategy, eod: int) -> None:
        self.strategy, self.eod = strategy, eod
        self._tokens, self._starts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)

    def numbers(self, chunk: IntArray, begins: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Returns the number of the n-gram that ends at each token of the next chunk.

        Args:
            chunk: token ids [n].
            begins: [n], True where a document begins.
        """
        kept = len(self._tokens)
        tokens = np.concatenate([self._tokens, chunk.astype(np.int64)])
        starts = np.concatenate([self._starts, begins]) | starts_after(tokens, self.eod)
        earlier = NGRAM_TOKENS[self.strategy] - 1
        self._tokens, self._starts = tokens[-earlier:], starts[-earlier:]
        numbers: npt.NDArray[np.int64] = ngram_numbers(tokens, starts, self.strategy)
        return numbers[kept:]


def _begins(index: Index, begin: int, count: int) -> npt.NDArray[np.bool_]:
    """Returns which of `count` tokens from `begin` on are the first of a document."""
    found = np.zeros(count, dtype=bool)
    for starts, _ in _documents_between(index, begin, begin + count):
        found[starts[starts >= begin] - begin] = True
    return found


def document_ids(tokens: IntArray, table: TableArray, strategy: Strategy, *, eod: int) -> IntArray:
    """Computes the per-layer ids [n] of the first n tokens of a document, for example of a prompt.

    Args:
        tokens: [n] token ids; an `eod` at the end ends the document.
        table: [V] per-layer id of each token id.
        strategy: the strategy that the table was built for.
        eod: end-of-document token id of the main tokenizer.
    """
    if strategy in NGRAM_TOKENS:
        return _Ngrams(strategy, eod).numbers(tokens, np.zeros(len(tokens), dtype=bool))
    ids = table[tokens]
    if strategy == "attention_guidance" and len(tokens):
        ids[ATTENTION_PERIOD::ATTENTION_PERIOD] = SPECIAL["<|attention|>"]
        ids[0] = SPECIAL["<|layer_start|>"]
        if tokens[-1] == eod:
            ids[-1] = SPECIAL["<|layer_end|>"]
    return ids


def _mark(index: Index, ids: IntArray, tokens: IntArray, begin: int, eod: int) -> None:
    """Writes the position-dependent ids into `ids`, which holds the ids of tokens `begin` .. `begin + len(ids) - 1`."""
    end = begin + len(ids)
    for starts, ends in _documents_between(index, begin, end):
        # Marks positions start + 10, start + 20, ... of each document, cut to [begin, end).
        first = np.maximum(1, -((starts - begin) // ATTENTION_PERIOD))
        last = -((starts - np.minimum(ends, end)) // ATTENTION_PERIOD)  # first multiple that is past the end
        count = np.maximum(last - first, 0)
        running = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        ids[np.repeat(starts + ATTENTION_PERIOD * first - begin, count) + ATTENTION_PERIOD * running] = (
            SPECIAL["<|attention|>"]
        )
        ids[starts[starts >= begin] - begin] = SPECIAL["<|layer_start|>"]
        final = ends[ends <= end] - 1 - begin
        ids[final[tokens[final] == eod]] = SPECIAL["<|layer_end|>"]


def _documents_between(
    index: Index, begin: int, end: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yields (starts, ends): int64 token offsets of the non-empty documents that overlap tokens [begin, end)."""
    document = _document_at(index, begin)
    while document < index.num_documents:
        upto = min(document + _CHUNK_DOCUMENTS, index.num_documents)
        bounds = index.document_starts(document, upto + 1)
        inside = bounds[:-1] < end
        keep = inside & (bounds[1:] > bounds[:-1])
        yield bounds[:-1][keep], bounds[1:][keep]
        if not inside.all():
            return
        document = upto


def _document_at(index: Index, token: int) -> int:
    """Returns the last document that starts at or before a token offset; found by bisection of the index."""
    low, high = 0, index.num_documents
    while high - low > 1:
        middle = (low + high) // 2
        if index.document_starts(middle, middle + 1)[0] <= token:
            low = middle
        else:
            high = middle
    return low


def check_bounds(index: Index, tokens: IntArray, vocab_size: int) -> None:
    """Raises `ValueError` if a token id is not in [0, V)."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{bin_path(index.prefix)} holds token id {wrong}, but the vocabulary has {vocab_size} ids"
        )
