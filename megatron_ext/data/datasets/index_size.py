"""Refuses a run whose sample index, which mcore builds before training, does not fit into memory.

The index lists every document of every pass over a dataset, and for every sample its position in that list.
"""

import math

from megatron_ext.data.datasets.blends import SPLITS, Blends, tokens_between
from megatron_ext.data.indexed.indexed_files import open_index
from megatron_ext.platform.device_memory import host_memory

_BYTES_OF_A_DOCUMENT = 20
"""Bytes per document and pass while the list is built: two 64-bit numbers and one 32-bit number."""

_BYTES_OF_A_SAMPLE = 12
"""Bytes per sample: two 32-bit numbers for the sample's first token, and one for its place in the order."""

_LENGTH_FLAGS = {"training": "--train-iters, --global-batch-size or --seq-length"}


def check_index_size(blends: Blends, seq_length: int) -> None:
    """Raises `ValueError` if the index of a dataset would take more than this machine's memory.

    Args:
        blends: the run's datasets; every split that is needed must have documents (see `check_splits`).
        seq_length: tokens per sample.
    """
    limit = host_memory()
    for number, (name, samples) in enumerate(zip(SPLITS, blends.num_samples, strict=True)):
        if not samples:
            continue
        blend = blends.blend if blends.blend is not None else (blends.blend_per_split or [])[number]
        prefixes, weights = blend or ([], None)
        if len(prefixes) > 1 and weights is None:
            continue  # at most one pass
        begin = sum(blends.split[:number]) if blends.blend is not None else 0.0
        end = sum(blends.split[: number + 1]) if blends.blend is not None else 1.0
        for prefix, weight in zip(prefixes, weights or [1.0], strict=True):
            wanted = math.ceil(samples * weight / sum(weights or [1.0]))
            documents = round((end - begin) * open_index(prefix).num_sequences)
            passes = math.ceil((wanted * seq_length + 1) / tokens_between(prefix, begin, end))
            needed = passes * documents * _BYTES_OF_A_DOCUMENT + wanted * _BYTES_OF_A_SAMPLE
            if needed > limit:
                flags = _LENGTH_FLAGS.get(name, "--eval-iters, --global-batch-size or --seq-length")
                raise ValueError(
                    f"{prefix}: {wanted:,} {name} samples of {seq_length:,} tokens take {passes:,} "
                    "passes over the dataset's documents; the index of these samples needs "
                    f"{needed / 2**30:,.0f} GiB of memory, but this machine has "
                    f"{limit / 2**30:,.0f} GiB; lower {flags}"
                )
