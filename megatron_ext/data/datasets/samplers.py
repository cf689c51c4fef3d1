"""Megatron's sequential sampler: which samples a data-parallel rank reads, given the samples consumed so far.

With d data-parallel ranks and micro-batches of b samples, step k of rank r holds the samples

    consumed + k * b * d + r * b + (0 .. b - 1)

so all ranks together read b * d consecutive samples in each step, and a global batch holds the same samples for every
d. The dataset's own shuffle index makes the order random; this file uses no random numbers, so a run can resume at
any point from its count of consumed samples, even with another d. After the last sample of the dataset, the sampler
starts again at sample 0. Only a blend without weights can run out of samples; every other dataset is built with all
the samples that the run needs.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from megatron_ext.data.datasets.loader_processes import LoaderContext, deaths_told_later

Dataset = torch.utils.data.Dataset[dict[str, torch.Tensor]]


class SequentialBatchSampler(Sampler[list[int]]):
    """Yields the micro-batches of one data-parallel rank, as lists of sample numbers, without end."""

    def __init__(
        self,
        num_samples: int,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        """Checks and stores the arguments; see `build_data_iterator`."""
        if num_samples < 1:
            raise ValueError("the dataset has no samples")
        if consumed_samples < 0 or micro_batch_size < 1:
            raise ValueError(
                f"consumed samples {consumed_samples} must be at least 0, "
                f"and micro-batch size {micro_batch_size} at least 1"
            )
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"data-parallel rank {data_parallel_rank} must lie between 0 and {data_parallel_size - 1}"
            )
        self.num_samples = num_samples
        self.first = consumed_samples + data_parallel_rank * micro_batch_size
        self.micro_batch_size = micro_batch_size
        self.step = micro_batch_size * data_parallel_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yields micro-batches for ever, as lists of sample numbers."""
        start = self.first
        while True:
            yield [number % self.num_samples for number in range(start, start + self.micro_batch_size)]
            start += self.step


def build_data_iterator(
    dataset: Dataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Returns an endless iterator over one data-parallel rank's micro-batches; each value is [micro_batch_size, ...].

    Args:
        dataset: the samples, as dictionaries of tensors.
        consumed_samples: samples that all ranks together have read so far; 0 at the start of a run.
        micro_batch_size: samples per micro-batch.
        data_parallel_rank: index of this rank among the `data_parallel_size` ranks that read different samples.
        data_parallel_size: number of such ranks.
        num_workers: number of loader processes; with 0, this process reads the samples itself.

    Raises:
        ValueError: an argument is out of range or the dataset is empty.
    """
    sampler = SequentialBatchSampler(
        len(dataset),  # type: ignore[arg-type]  # torch's Dataset does not declare __len__
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        multiprocessing_context=LoaderContext() if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        # The loader draws its workers' seed from this generator. A draw from torch's default generator would change
        # the dropout masks of a resumed run.
        generator=torch.Generator(),
    )
    with deaths_told_later():
        return iter(loader)
