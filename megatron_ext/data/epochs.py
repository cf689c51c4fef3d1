"""How many samples one pass over the training data has, for runs whose length is given in epochs.

    samples = sum over datasets of (tokens of the training split - 1) // sequence length

as mcore's `GPTDataset` counts them. A blend's weights change how often a dataset is drawn, not how long an epoch is.
"""

from megatron_ext.config.data import DataConfig
from megatron_ext.data.blends import blends_of, tokens_between


def epoch_samples(data: DataConfig, seq_length: int) -> int:
    """Sequences of `seq_length` tokens in the training data.

    Raises:
        OSError: a dataset is not there.
        ValueError: no data is given, a dataset is damaged, or all of it is less than one sequence.
    """
    blends = blends_of(data, (1, 0, 0), None)
    blend = blends.blend if blends.blend is not None else (blends.blend_per_split or [None])[0]
    share = blends.split[0] if blends.blend is not None else 1.0
    prefixes = blend[0] if blend is not None else []
    samples = sum(max(0, tokens_between(prefix, 0.0, share) - 1) // seq_length for prefix in prefixes)
    if samples == 0:
        raise ValueError(f"--num-epochs: the training data has less than one sequence of {seq_length} tokens")
    return samples
