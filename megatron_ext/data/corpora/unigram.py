"""The simplest language model, which every trained model must beat: the frequencies of single tokens.

Its cross-entropy, in nats per token, is

H = - sum_v q(v) log p(v),   q: frequencies in the evaluated data,  p: in the training data, add-one smoothed
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import IndexedDataset

_CHUNK = 1 << 22


def unigram_cross_entropy(train_prefix: str, data_prefix: str, vocab_size: int) -> float:
    """Returns the cross-entropy, in nats per token, of data predicted by the token frequencies of the training data.

    Args:
        train_prefix: indexed dataset whose token frequencies are the model.
        data_prefix: indexed dataset to predict; may equal `train_prefix`.
        vocab_size: number of token ids.
    """
    train = token_counts(train_prefix, vocab_size) + 1.0
    data = token_counts(data_prefix, vocab_size)
    log_p = np.log(train) - math.log(train.sum())
    return float(-(data * log_p).sum() / data.sum())


def most_frequent_token(prefix: str, vocab_size: int) -> int:
    """Returns the token id that occurs most often in an indexed dataset, the prediction of a unigram model."""
    return int(token_counts(prefix, vocab_size).argmax())


def token_counts(prefix: str, vocab_size: int) -> npt.NDArray[np.float64]:
    """Returns how often every token id occurs in an indexed dataset, [V]."""
    counts = np.zeros(vocab_size, dtype=np.float64)
    for tokens in _chunks(prefix):
        counts += np.bincount(tokens, minlength=vocab_size)[:vocab_size]
    return counts


def _chunks(prefix: str) -> Iterator[npt.NDArray[np.int64]]:
    dtype = IndexedDataset(prefix).index.dtype
    tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    for start in range(0, len(tokens), _CHUNK):
        yield tokens[start : start + _CHUNK].astype(np.int64)
