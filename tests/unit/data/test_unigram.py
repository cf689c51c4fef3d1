"""The frequencies of single tokens as a language model."""

import math
from pathlib import Path

import pytest

from megatron_ext.data.corpora.unigram import most_frequent_token, unigram_cross_entropy
from megatron_ext.testing.tiny_datasets import write_dataset


def test_the_guess_is_the_training_datas_and_the_rest_the_other_datas(tmp_path: Path) -> None:
    train, data = str(tmp_path / "train"), str(tmp_path / "data")
    write_dataset(train, [[[1, 1, 1, 2]], [[1, 3]]])
    write_dataset(data, [[[2, 2, 2, 1]], [[3, 1, 1, 2]]])
    assert (most_frequent_token(train, 4), most_frequent_token(data, 4)) == (1, 2)
    p = {1: 5 / 10, 2: 2 / 10, 3: 2 / 10}  # add-one smoothed over four ids
    expected = -(3 * math.log(p[1]) + 4 * math.log(p[2]) + math.log(p[3])) / 8
    assert unigram_cross_entropy(train, data, 4) == pytest.approx(expected)
