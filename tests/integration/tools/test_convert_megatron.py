"""tools/convert_checkpoint.py --format megatron as a user calls it, and the training that goes on from its result."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.testing.torchrun import environment
from tools.convert_checkpoint import ExportConfig, ImportConfig

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "tests/distributed/checkpoint/kept_megatron/0.13.1"
IMPORT = ("import", "--format", "megatron", "--model-dir", str(KEPT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours`: the kept checkpoint of Megatron-LM, imported with its optimizer; `data`: a dataset of its ids."""
    path = tmp_path_factory.mktemp("megatron")
    told = run_script(
        "tools/convert_checkpoint.py", *IMPORT, "--with-optimizer", "--save", str(path / "ours")
    )
    assert told.returncode == 0, told.stderr
    assert "to continue after step 3, with the run's own flags:" in told.stdout
    random = np.random.default_rng(1)
    write_dataset(str(path / "data"), [[random.integers(0, 96, 60).tolist()] for _ in range(20)])
    return path


def _continued(folder: Path, processes: int, *flags: str) -> list[tuple[str, str]]:
    """Returns number and loss of each step after an import, with the run's own schedule."""
    ours = str(folder / "ours")
    run = ("--config", f"{ours}/model.yaml", "--load", ours, "--data-path", str(folder / "data"))
    schedule = ("--lr", "1e-2", "--min-lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2")
    rest = (
        "--train-iters",
        "10",
        "--global-batch-size",
        "4",
        "--micro-batch-size",
        "1",
        "--weight-decay",
        "0.1",
    )
    exits = ("--log-interval", "1", "--eval-iters", "0", "--exit-interval", "6")
    done = run_script(
        "pretrain_gpt_per_layer.py", *run, *schedule, *rest, *exits, *flags, processes=processes
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"step +(\d+)/10 \| lm loss (\S+)", done.stdout)


def test_a_run_continues_at_another_layout_with_the_same_losses(folder: Path) -> None:
    alone = _continued(folder, 1)
    assert [step for step, _ in alone] == ["4", "5", "6"]
    assert _continued(folder, 2, "--tensor-model-parallel-size", "2") == alone


def test_another_schedule_is_refused_with_both_values(folder: Path) -> None:
    ours = str(folder / "ours")
    run = ("--config", f"{ours}/model.yaml", "--load", ours, "--data-path", str(folder / "data"))
    rest = ("--train-iters", "10", "--global-batch-size", "4", "--micro-batch-size", "1", "--lr", "0.5")
    done = run_script("pretrain_gpt_per_layer.py", *run, *rest)
    assert done.returncode != 0
    assert "--lr 0.5" in done.stderr
    assert "was made with 0.01" in done.stderr


def test_a_killed_import_leaves_nothing_under_its_name_and_the_next_one_succeeds(tmp_path: Path) -> None:
    command = [sys.executable, "tools/convert_checkpoint.py", *IMPORT, "--save", str(tmp_path / "ours")]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ) | environment())
    writing = tmp_path / ".ours.writing"
    deadline = time.monotonic() + 120
    while not writing.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode == -signal.SIGKILL:
        assert not (tmp_path / "ours").exists() or not writing.exists()
    done = run_script("tools/convert_checkpoint.py", *IMPORT, "--save", str(tmp_path / "second"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "fields", "error"),
    [
        (ImportConfig, {"save": "x", "with_optimizer": True}, "--with-optimizer: requires --format megatron"),
        (
            ImportConfig,
            {"save": "x", "format": "megatron", "make_vocab_size_divisible_by": 8},
            "--make-vocab-size-divisible-by: has no effect .* the vocabulary keeps all trained rows",
        ),
        (
            ExportConfig,
            {"load": "x", "format": "megatron", "merge_adapters": True},
            "--merge-adapters: requires --format huggingface",
        ),
        (ExportConfig, {"load": "x", "with_optimizer": True}, "--with-optimizer: requires --format megatron"),
        (
            ExportConfig,
            {"load": "x", "format": "megatron", "with_optimizer": True, "base_only": True},
            "--base-only: cannot be given together with --with-optimizer",
        ),
    ],
)
def test_flags_of_the_other_format_are_refused(config: type, fields: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        config(model_dir="y", **fields)
