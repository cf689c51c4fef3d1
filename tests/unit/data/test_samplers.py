"""The sequential sampler, by consumed samples."""

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.datasets.samplers import SequentialBatchSampler, build_data_iterator


class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sample i is {"number": i}."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(number)}


def micro_batches(
    steps: Any, *, size: Any = 10_000, consumed: Any = 0, micro: Any = 2, rank: Any = 0, ranks: Any = 1
) -> Any:
    sampler = SequentialBatchSampler(
        size,
        consumed_samples=consumed,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )
    return list(islice(sampler, steps))


@given(consumed=st.integers(0, 500), micro=st.integers(1, 4), ranks=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_a_global_batch_holds_the_same_samples_whatever_the_cut(
    consumed: Any, micro: Any, ranks: Any
) -> None:
    global_batch = 12 * micro
    accumulation = global_batch // (micro * ranks)
    read = [
        number
        for rank in range(ranks)
        for batch in micro_batches(accumulation, consumed=consumed, micro=micro, rank=rank, ranks=ranks)
        for number in batch
    ]
    assert sorted(read) == list(range(consumed, consumed + global_batch))


@given(steps=st.integers(1, 30), ranks=st.integers(1, 4), rank=st.integers(0, 3), micro=st.integers(1, 3))
def test_resuming_gives_what_the_uninterrupted_run_reads_next(
    steps: Any, ranks: Any, rank: Any, micro: Any
) -> None:
    rank %= ranks
    whole = micro_batches(steps + 5, micro=micro, rank=rank, ranks=ranks)
    resumed = micro_batches(5, consumed=steps * micro * ranks, micro=micro, rank=rank, ranks=ranks)
    assert resumed == whole[steps:]


def test_order_is_megatrons() -> None:
    assert micro_batches(2, consumed=4, micro=2, rank=1, ranks=2) == [[6, 7], [10, 11]]


def test_past_the_end_the_numbering_starts_again() -> None:
    assert micro_batches(3, size=5, micro=2) == [[0, 1], [2, 3], [4, 0]]


def test_iterator_gives_batches_in_order() -> None:
    assert_batches_in_order(num_workers=0)


def assert_batches_in_order(num_workers: int) -> None:
    """Reads three batches of three numbers from the fourth on."""
    iterator = build_data_iterator(
        Numbers(9),
        consumed_samples=3,
        micro_batch_size=3,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=num_workers,
    )
    assert [batch["number"].tolist() for batch in islice(iterator, 3)] == [[3, 4, 5], [6, 7, 8], [0, 1, 2]]


def test_values_out_of_range_are_refused() -> None:
    for wrong in ({"rank": 2, "ranks": 2}, {"consumed": -1}, {"micro": 0}, {"size": 0}):
        with pytest.raises(ValueError, match=r"rank 2|consumed samples -1|size 0|no samples"):
            micro_batches(1, **wrong)
