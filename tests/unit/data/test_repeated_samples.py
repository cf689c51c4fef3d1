"""Epochs of the same samples."""

import pytest
import torch

from megatron_ext.data.datasets.repeated_samples import RepeatedDataset

DATA = [{"tokens": torch.tensor([number])} for number in range(14)]


def _read(dataset: RepeatedDataset, numbers: range) -> list[int]:
    return [int(dataset[number]["tokens"]) for number in numbers]


def test_every_epoch_has_the_same_blocks_in_another_order() -> None:
    dataset = RepeatedDataset(DATA, epoch_samples=13, block=2, num_samples=40, seed=1)
    assert len(dataset) == 40
    epochs = [_read(dataset, range(12 * epoch, 12 * epoch + 12)) for epoch in range(3)]
    assert epochs[0] == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for epoch in epochs:
        blocks = {tuple(epoch[place : place + 2]) for place in range(0, 12, 2)}
        assert blocks == {(first, first + 1) for first in range(0, 12, 2)}
    assert [int(dataset[number]["epoch"]) for number in (0, 11, 12, 24)] == [0, 0, 1, 2]


def test_after_the_given_repeats_the_next_samples_follow_in_the_datasets_order() -> None:
    dataset = RepeatedDataset(DATA, epoch_samples=6, block=2, num_samples=30, seed=1, repeats=2)
    epochs = [_read(dataset, range(6 * epoch, 6 * epoch + 6)) for epoch in range(4)]
    assert epochs[0] == list(range(6)) and epochs[2] == list(range(6, 12))
    assert sorted(epochs[1]) == epochs[0] != epochs[1]
    assert sorted(epochs[3]) == epochs[2] != epochs[3]


def test_samples_do_not_depend_on_what_was_read_before() -> None:
    whole = _read(RepeatedDataset(DATA, epoch_samples=8, block=4, num_samples=40, seed=1), range(40))
    later = _read(RepeatedDataset(DATA, epoch_samples=8, block=4, num_samples=40, seed=1), range(21, 40))
    assert later == whole[21:]


def test_an_epoch_is_at_most_the_dataset_and_at_least_one_block() -> None:
    dataset = RepeatedDataset(DATA, epoch_samples=1000, block=7, num_samples=28, seed=1)
    assert sorted(_read(dataset, range(14))) == sorted(_read(dataset, range(14, 28))) == list(range(14))
    with pytest.raises(ValueError, match="--epoch-samples 3: an epoch must hold at least the 4 samples"):
        RepeatedDataset(DATA, epoch_samples=3, block=4, num_samples=8, seed=1)
