"""A model with a sliding window is run up to its window, as transformers runs it; all that would go past is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config.command_line.error_lines import main_guard
from megatron_ext.npt.runs.npt_model import NPTModel
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from pretrain_gpt_per_layer import main as pretrain_gpt
from pretrain_npt import main as pretrain_npt
from tests.unit.interop.hf_models import Kind, alone
from tools.convert_checkpoint import main as convert
from tools.evaluate import main as evaluate
from tools.generate import main as generate

WINDOW = 24
MISTRAL = Kind("Mistral", {"sliding_window": WINDOW, "head_dim": 8})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`: a Mistral with a window; `checkpoint`: imported; `data`: for its tokenizer."""
    path = tmp_path_factory.mktemp("window")
    MISTRAL.build().save_pretrained(path / "hf")
    assert alone(convert, ["import", "--model-dir", f"{path}/hf", "--save", f"{path}/checkpoint"]) == 0
    ids = np.random.default_rng(1).integers(0, 95, (20, 60)).tolist()
    write_dataset(str(path / "data"), [[document] for document in ids])
    return path


def _called(main: Callable[[], Any], arguments: list[str]) -> tuple[Any, str]:
    """Exit code and standard error of an entry point."""
    import contextlib
    import io

    sys.argv = ["tool", *arguments]
    errors = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(errors):
        try:
            code = main_guard(main)() or 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, errors.getvalue()


def test_the_import_records_the_window(folder: Path) -> None:
    assert read_run_config(f"{folder}/checkpoint")["model"]["sliding_window"] == WINDOW
    assert f"sliding_window: {WINDOW}" in (folder / "checkpoint" / "model.yaml").read_text()


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (generate, "--prompt 5 --max-new-tokens 24", "--max-new-tokens 24, after a prompt of 1 tokens"),
        (evaluate, "--data-path {0}/data --seq-length 25", "--seq-length 25: a sequence of 25 tokens"),
        (
            pretrain_npt,
            "--mode lm --np-rank 2 --lr 1e-3 --train-iters 1 --data-path {0}/data --save {0}/npt --seq-length 32",
            "--seq-length 32: a sequence of 32 tokens",
        ),
        (
            pretrain_gpt,
            "--config {0}/checkpoint/model.yaml --finetune --lr 1e-3 --train-iters 1 --data-path {0}/data "
            "--seq-length 32",
            "--seq-length 32: a sequence of 32 tokens",
        ),
    ],
)
def test_what_goes_past_the_window_is_one_line_and_exit_code_2(
    main: Callable[[], Any], arguments: str, words: str, folder: Path
) -> None:
    line = f"--load {folder}/checkpoint " + arguments.format(folder)
    code, errors = alone(_called, main, line.split())
    assert code == 2
    last = errors.splitlines()[-1]  # generation names the checkpoint that it has loaded before
    assert last.startswith("error: ") and errors.count("error: ") == 1
    assert words in last
    assert f"sliding window of {WINDOW}" in errors


def test_a_training_keeps_the_window_of_what_it_loads_and_another_one_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    line = f"--load {folder}/checkpoint --finetune --lr 1e-3 --train-iters 1 --eval-iters 0 --data-path {folder}/data"
    code, errors = alone(_called, pretrain_gpt, [*line.split(), "--save", str(tmp_path / "kept")])
    assert code == 0, errors
    assert read_run_config(str(tmp_path / "kept"))["model"]["sliding_window"] == WINDOW
    code, errors = alone(_called, pretrain_gpt, [*line.split(), "--sliding-window", str(WINDOW + 8)])
    assert code == 2
    folder = folder / "checkpoint" / "iter_0000000"
    assert f"--sliding-window {WINDOW + 8}: the checkpoint {folder} was made with {WINDOW}" in errors


def _in_python(path: str, length: int) -> list[Any]:
    model = NPTModel.from_pretrained(path)
    found: list[Any] = [model.generate([5, 6, 7], max_new_tokens=WINDOW - 3, temperature=0)]
    for call in (
        lambda: model.generate([5, 6, 7], max_new_tokens=WINDOW - 2),
        lambda: model.logits(list(range(length))),
    ):
        with pytest.raises(ValueError, match=f"sliding window of {WINDOW}"):
            call()
    found.append(model.logits(list(range(WINDOW))))
    return found


@pytest.mark.parametrize("source", ["hf", "checkpoint"])
def test_up_to_the_window_the_python_api_equals_transformers_and_beyond_it_refuses(
    source: str, folder: Path
) -> None:
    new, logits = alone(_in_python, f"{folder}/{source}", WINDOW + 1)
    theirs = MISTRAL.build()
    prompt = torch.tensor([[5, 6, 7]])
    assert new == theirs.generate(prompt, max_new_tokens=WINDOW - 3, do_sample=False)[0, 3:].tolist()
    expected = theirs(torch.arange(WINDOW)[None]).logits[0]
    torch.testing.assert_close(logits.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
