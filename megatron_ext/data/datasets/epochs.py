"""Counts the samples of one pass over the training data, for runs whose length is given in epochs.

    samples = sum over datasets of (tokens of the training split - 1) // sequence length

This is the count of mcore's `GPTDataset`. A blend's weights change how often each dataset is sampled, but not the
length of an epoch.
"""

import math

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.data.datasets.blends import blends_of, tokens_between

_SURPLUS = 0.005
"""Fraction of extra samples that mcore requests from each dataset of a weighted blend
(`mid_level_dataset_surplus`).
"""

_SHUFFLED_APART_BELOW = 0.8
"""mcore shuffles the last epoch separately if less than this share of it is read."""


def epoch_samples(data: DataConfig, seq_length: int) -> int:
    """Returns the number of sequences of `seq_length` tokens in one pass over the training data.

    Raises:
        OSError: a dataset does not exist.
        ValueError: no data is given, a dataset is damaged, or the data is shorter than one sequence.
    """
    if data.mock_data:
        raise ValueError("--num-epochs: --mock-data has no epochs; give --train-iters or --train-samples")
    samples = sum(max(0, tokens - 1) // seq_length for tokens in _training_blend(data)[0])
    if samples == 0:
        raise ValueError(
            f"--num-epochs: the training data has less than one sequence of {seq_length} tokens; lower --seq-length "
            "or give more data"
        )
    return samples


def shuffled_epochs(data: DataConfig, seq_length: int, num_samples: int) -> list[tuple[int, bool]]:
    """Returns how mcore shuffles the epochs of each dataset.

    Together with the data, the split, the sequence length and the seed, this determines the order of the samples.

    Args:
        data: the training data.
        seq_length: tokens per sample.
        num_samples: samples that the whole run reads.

    Returns:
        For each dataset, the number of its epochs, and whether the last epoch is shuffled separately from the others.
        If two runs of different lengths have equal results, they read the same samples in the same order until the
        shorter one ends.

    Raises:
        OSError, ValueError: see `epoch_samples`.
    """
    tokens, weights = _training_blend(data)
    if weights is None and len(tokens) > 1:
        return [(1, False)] * len(tokens)  # a blend without weights lasts one epoch
    if weights is None:
        wanted = [num_samples]
    else:
        parts = [math.ceil(num_samples * weight / sum(weights)) for weight in weights]
        wanted = [math.ceil(part * (1 + _SURPLUS)) for part in parts]
    return [_epochs(*pair, seq_length) for pair in zip(tokens, wanted, strict=True)]


def _epochs(tokens: int, num_samples: int, seq_length: int) -> tuple[int, bool]:
    epochs = max(1, -(-(num_samples * seq_length + 1) // tokens))
    of_last = num_samples - ((epochs - 1) * tokens - 1) // seq_length
    of_each = (tokens - 1) // seq_length
    return epochs, epochs > 1 and of_last < int(_SHUFFLED_APART_BELOW * of_each)


def _training_blend(data: DataConfig) -> tuple[list[int], list[float] | None]:
    """Returns the number of tokens in each dataset's training split, and the blend's weights."""
    blends = blends_of(data, (1, 0, 0), None)
    blend = blends.blend if blends.blend is not None else (blends.blend_per_split or [None])[0]
    share = blends.split[0] if blends.blend is not None else 1.0
    prefixes, weights = blend if blend is not None else ([], None)
    return [tokens_between(prefix, 0.0, share) for prefix in prefixes], weights
