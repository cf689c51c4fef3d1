"""A model with a sliding window computes past its window what transformers computes: in Python, generation, training.

A checkpoint that an earlier version imported without its window still refuses all that would go past it.
"""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_ext.config.command_line.error_lines import main_guard
from megatron_ext.npt.runs.npt_model import NPTModel
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.checkpoint import checkpoint_files as files
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
    """`hf`: a Mistral with a window; `checkpoint`: imported; `earlier`: as an earlier version imported it; `data`: for
    its tokenizer."""
    path = tmp_path_factory.mktemp("window")
    MISTRAL.build().save_pretrained(path / "hf")
    assert alone(convert, ["import", "--model-dir", f"{path}/hf", "--save", f"{path}/checkpoint"]) == 0
    _as_earlier(path / "checkpoint", path / "earlier")
    ids = np.random.default_rng(1).integers(0, 95, (20, 60)).tolist()
    write_dataset(str(path / "data"), [[document] for document in ids])
    return path


def _as_earlier(checkpoint: Path, target: Path) -> None:
    """Copies an imported checkpoint with the configuration that an earlier version wrote."""
    shutil.copytree(checkpoint, target)
    file = target / "iter_0000000" / "run_config.json"
    content = json.loads(file.read_text())
    del content["model"]["window_size"], content["model"]["window_attn_skip_freq"]
    content["model"] |= {
        "sliding_window": WINDOW,
        "max_position_embeddings": WINDOW,
        "seq_length": WINDOW,
    }
    file.write_text(json.dumps(content))
    manifest = json.loads((file.parent / files.CHECKSUMS).read_text())["files"]
    files.write_checksums(file.parent, manifest | files.digests(file.parent, [files.RUN_CONFIG]))
    flags = yaml.safe_load((target / "model.yaml").read_text())
    (target / "model.yaml").write_text(yaml.safe_dump({**flags, "model": content["model"]}))


def _called(main: Callable[[], Any], arguments: list[str]) -> tuple[Any, str, str]:
    """Exit code, standard error and output of an entry point."""
    sys.argv = ["tool", *arguments]
    errors, printed = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        try:
            code = main_guard(main)() or 0
        except SystemExit as left:
            code = int(left.code or 0)
    return code, errors.getvalue(), printed.getvalue()


def test_the_import_records_the_window(folder: Path) -> None:
    stored = read_run_config(f"{folder}/checkpoint")["model"]
    assert stored["window_size"] == f"{WINDOW - 1},0"
    assert (stored["max_position_embeddings"], stored["sliding_window"]) == (64, None)
    flags = yaml.safe_load((folder / "checkpoint" / "model.yaml").read_text())
    assert flags["model"]["window_size"] == f"{WINDOW - 1},0"


def test_generation_past_the_window_gives_the_tokens_of_transformers(folder: Path) -> None:
    line = f"--load {folder}/checkpoint --prompt 5 --max-new-tokens 40 --temperature 0"
    code, _, printed = alone(_called, generate, line.split())
    theirs = MISTRAL.build().generate(torch.tensor([[5]]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert code == 0
    assert [int(word) for word in printed.split() if word.isdigit()] == theirs


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
            "--config {0}/earlier/model.yaml --finetune --lr 1e-3 --train-iters 1 --data-path {0}/data "
            "--seq-length 32",
            "--seq-length 32: a sequence of 32 tokens",
        ),
    ],
)
def test_what_was_imported_without_its_window_refuses_to_go_past_it_in_one_line(
    main: Callable[[], Any], arguments: str, words: str, folder: Path
) -> None:
    line = f"--load {folder}/earlier " + arguments.format(folder)
    code, errors, _ = alone(_called, main, line.split())
    assert code == 2
    last = errors.splitlines()[-1]  # generation names the checkpoint that it has loaded before
    assert last.startswith("error: ") and errors.count("error: ") == 1
    assert words in last
    assert f"sliding window of {WINDOW}" in errors


def test_a_training_keeps_the_window_of_what_it_loads_and_resumes_with_no_other(
    folder: Path, tmp_path: Path
) -> None:
    line = f"--load {folder}/checkpoint --finetune --lr 1e-3 --train-iters 1 --eval-iters 0 --data-path {folder}/data"
    code, errors, _ = alone(_called, pretrain_gpt, [*line.split(), "--save", str(tmp_path / "kept")])
    assert code == 0, errors
    assert read_run_config(str(tmp_path / "kept"))["model"]["window_size"] == f"{WINDOW - 1},0"
    again = line.replace("--finetune ", "").replace(f"{folder}/checkpoint", str(tmp_path / "kept"))
    code, errors, _ = alone(_called, pretrain_gpt, [*again.split(), "--window-size", "7,0"])
    assert code == 2
    assert (
        f"--window-size 7,0: the checkpoint {tmp_path}/kept/iter_0000001 was made with {WINDOW - 1},0"
        in errors
    )


def _in_python(path: str) -> list[Any]:
    model = NPTModel.from_pretrained(path)
    new = model.generate([5, 6, 7], max_new_tokens=2 * WINDOW, temperature=0)
    return [new, model.logits(list(range(2 * WINDOW)))]


@pytest.mark.parametrize("source", ["hf", "checkpoint"])
def test_the_python_api_equals_transformers_past_the_window(source: str, folder: Path) -> None:
    new, logits = alone(_in_python, f"{folder}/{source}")
    theirs = MISTRAL.build()
    prompt = torch.tensor([[5, 6, 7]])
    expected_tokens = theirs.generate(prompt, max_new_tokens=2 * WINDOW, do_sample=False)[0, 3:].tolist()
    assert new == expected_tokens
    expected = theirs(torch.arange(2 * WINDOW)[None]).logits[0]
    torch.testing.assert_close(logits.detach(), expected.detach(), rtol=1e-4, atol=1e-4)
