"""--mock-data: the engine's made-up documents, from no file, the same in every run, in all three families."""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.config.groups.data_config import DataConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.datasets.gpt_dataset import build_datasets
from megatron_ext.data.tokenizers import build_tokenizer
from megatron_ext.testing.run_single import clean_process

VOCABULARY, EOD = 40, 39
MODEL = (
    "--hidden-size 16 --num-attention-heads 2 --seq-length 8 --tokenizer-type NullTokenizer --vocab-size 39 "
    "--micro-batch-size 2 --lr 1e-3 --mock-data --num-workers 0 --eval-iters 1 --log-interval 1 "
    "--device-peak-tflops 1"
)
RUNS = {
    "pretrain_gpt_per_layer.py": "--num-layers 2 --train-iters 2 --use-per-layer-embedding --per-layer-hidden-size 8 "
    "--per-layer-vocab-size 7",
    "pretrain_npt.py": "--num-layers 2 --train-iters 2 --no-freeze-base --mode lm --np-rank 2 --swiglu "
    "--ffn-hidden-size 24",
    "pretrain_progressive.py": "--target-stacks 2 --n-blocks 1 --stack-steps 1 --training-objective mlm",
}


def test_samples_count_upwards_within_documents_and_are_the_same_in_every_run() -> None:
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=EOD))
    assert (tokenizer.vocab_size, tokenizer.eod) == (VOCABULARY, EOD)
    data = DataConfig(mock_data=True)
    sets = [
        build_datasets(data, seq_length=100, seed=1, num_samples=(5, 3, 0), tokenizer=tokenizer)
        for _ in range(2)
    ]
    (train, valid, test), again = sets
    assert train is not None and valid is not None and test is None
    assert not torch.equal(train[0]["tokens"], valid[0]["tokens"])
    for number in range(5):
        sample = train[number]
        assert all(torch.equal(value, again[0][number][name]) for name, value in sample.items())  # type: ignore[index]
        tokens, labels = sample["tokens"], sample["labels"]
        goes_on = labels == (tokens + 1) % VOCABULARY
        ends, begins = labels == EOD, (tokens == EOD) & (labels == 1)
        assert bool((goes_on | ends | begins).all()) and int(goes_on.sum()) > 90


def train_here(script: str, flags: str) -> str:
    """Runs a script on the made-up data in this process; returns what it prints about losses and the loss scale."""
    printed = io.StringIO()
    with clean_process(), contextlib.redirect_stdout(printed):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
        sys.argv = [script, *MODEL.split(), *flags.split()]
        assert importlib.import_module(script.removesuffix(".py")).main() == 0
    return "\n".join(re.findall(r"(?:lm loss|loss scale)[^|\n]*", printed.getvalue()))


@pytest.mark.parametrize("script", RUNS)
def test_every_family_trains_and_evaluates_on_it_with_equal_losses_in_two_runs(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (train_here(script, f"{RUNS[script]} --save {tmp_path / name}") for name in "ab")
    assert first == second
    assert first.count("\n") >= 3
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-epochs 1", "--num-epochs: --mock-data has no epochs"),
        (
            "--train-iters 1 --use-per-layer-embedding --per-layer-data-path here",
            "--per-layer-data-path: cannot be given together with --mock-data",
        ),
        ("--train-iters 1 --data-path here", "--mock-data: cannot be given together with --data-path"),
    ],
)
def test_what_needs_files_is_refused(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_ext.config.command_line.error_lines import run_main
    from pretrain_gpt_per_layer import main

    with clean_process():
        sys.argv = ["pretrain_gpt_per_layer.py", *MODEL.split(), "--num-layers", "2", *flags.split()]
        with pytest.raises(SystemExit) as ended:
            run_main(main)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
