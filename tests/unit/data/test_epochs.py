"""Which lengths of a run share one order of samples: against the samples that mcore makes."""

from typing import Any

import numpy as np
import pytest

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.data.datasets.epochs import epoch_samples, shuffled_epochs
from megatron_ext.data.datasets.gpt_dataset import build_datasets
from megatron_ext.testing.tiny_datasets import ListTokenizer, write_dataset

SEQ = 16
TOKENIZER = ListTokenizer([f"t{number}" for number in range(60000)])


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two datasets in which no token comes twice, so that a sample is known by its first."""
    folder, random, next_token = tmp_path_factory.mktemp("data"), np.random.default_rng(0), 1
    found = []
    for name, documents in (("a", 40), ("b", 25)):
        prefix, made = f"{folder}/{name}", []
        for length in random.integers(1, 40, documents).tolist():
            made.append([list(range(next_token, next_token + length))])
            next_token += length
        write_dataset(prefix, made)
        found.append(prefix)
    return found


def taken(data: DataConfig, samples: int) -> list[int]:
    train: Any = build_datasets(
        data, seq_length=SEQ, seed=1, num_samples=(samples, 0, 0), tokenizer=TOKENIZER
    )[0]
    return [int(train[number]["tokens"][0]) for number in range(samples)]


@pytest.mark.parametrize("kind", ["one dataset", "a split of one", "a blend"])
def test_runs_share_an_order_exactly_where_their_epochs_are_shuffled_alike(
    prefixes: list[str], kind: str
) -> None:
    path = ("0.7", prefixes[0], "0.3", prefixes[1]) if kind == "a blend" else (prefixes[0],)
    data = DataConfig(data_path=path, split="7,3" if kind == "a split of one" else "1")
    epoch = epoch_samples(data, SEQ)
    lengths = [
        epoch // 3,
        epoch - 1,
        epoch,
        epoch + 1,
        epoch * 3 // 2,
        epoch * 9 // 5,
        epoch * 2,
        epoch * 5 // 2,
    ]
    orders = {length: taken(data, length) for length in lengths}
    seen = set()
    for short in lengths:
        for long in lengths[lengths.index(short) + 1 :]:
            equal = orders[long][:short] == orders[short]
            assert (shuffled_epochs(data, SEQ, short) == shuffled_epochs(data, SEQ, long)) == equal
            seen.add(equal)
    assert seen == {True, False}


def test_a_blend_without_weights_has_one_order_whatever_the_length(prefixes: list[str]) -> None:
    data = DataConfig(data_path=(*prefixes, prefixes[0]), split="1")
    assert shuffled_epochs(data, SEQ, 10) == shuffled_epochs(data, SEQ, 10_000) == [(1, False)] * 3
