"""A run that goes on with its samples in another order says so, and one in the same order does not."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset

MODEL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --ffn-hidden-size 16 --tokenizer-type NullTokenizer "
    "--vocab-size 64 --num-workers 0 --global-batch-size 4 --lr 1e-3 --eval-iters 0 --device-peak-tflops 1 --split 1 "
    "--lr-decay-style constant"
)
TOLD = "the order of the training data has changed: "


def train(folder: Path, *flags: str) -> str:
    data = ["--data-path", str(folder / "corpus")]
    result = run_script("pretrain_gpt_per_layer.py", *MODEL.split(), *data, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 60 samples of 16 tokens, and a run that has taken 20 of them."""
    folder = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(1)
    write_dataset(str(folder / "corpus"), [[random.integers(1, 64, 32).tolist()] for _ in range(30)])
    train(folder, "--seq-length", "16", "--train-iters", "5", "--save", str(folder / "checkpoints"))
    return folder


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--seq-length 16 --train-iters 14", None),
        ("--seq-length 16 --train-iters 6 --micro-batch-size 2", None),
        (
            "--seq-length 8 --train-iters 6",
            "--seq-length is 8 now and 16 in the checkpoint; some of the 20 samples",
        ),
        ("--seq-length 16 --train-iters 6 --seed 5", "--seed is 5 now and 1234 in the checkpoint"),
        (
            "--seq-length 16 --train-iters 29 --exit-interval 6",
            "the run has 116 samples and the checkpoint's run 20, so different epochs are shuffled together",
        ),
        ("--seq-length 8 --train-iters 1 --finetune", None),
    ],
)
def test_another_order_of_the_training_samples_is_told_and_the_same_is_not(
    folder: Path, flags: str, told: str | None
) -> None:
    output = train(folder, "--load", str(folder / "checkpoints"), *flags.split())
    assert (TOLD in output) == (told is not None)
    if told is not None:
        (line,) = [line for line in output.splitlines() if line.startswith(TOLD)]
        assert told in line
