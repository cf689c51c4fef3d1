"""Tables on disk as users train them: killed and resumed, without room, and evaluated and generated from afterwards."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.torchrun import ROOT, environment
from tests.integration.npt.npt_run_helpers import write_data
from tests.integration.scripts.test_pretrain_gpt_per_layer import MODEL, command, losses, run

SHORT = ["--train-iters", "12", "--per-layer-sparse"]
SPARSE = [*SHORT, "--save-interval", "4"]
DISK = ["--per-layer-offload", "disk"]


def _errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An indexed dataset."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def resumed(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with tables on disk that was killed after step 4 and went on to step 12."""
    folder = tmp_path_factory.mktemp("resumed")
    tables = folder / "tables"
    where = ["--data-path", data, "--save", str(folder / "run"), "--tensorboard-dir", str(folder / "curves")]
    where += ["--per-layer-offload-dir", str(tables)]
    killed = command(*SPARSE, *DISK, *where)
    with subprocess.Popen(
        killed, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "saved step 4" in line:
                for worker in psutil.Process(process.pid).children(recursive=True):
                    worker.kill()
                break
        process.stdout.read()
    assert process.returncode != 0
    assert os.listdir(tables) == []
    result = run(*SPARSE, *DISK, *where, "--load", str(folder / "run"), processes=2)
    assert result.returncode == 0, result.stderr
    assert "the run continues after step 4" in result.stdout
    return folder


def test_a_killed_run_leaves_no_files_and_goes_on_to_the_losses_of_tables_on_the_device(
    data: str, resumed: Path, tmp_path: Path
) -> None:
    where = [
        "--data-path",
        data,
        "--save",
        str(tmp_path / "run"),
        "--tensorboard-dir",
        str(tmp_path / "curves"),
    ]
    straight = run(*SPARSE, *where, processes=2)
    assert straight.returncode == 0, straight.stderr
    expected = losses(tmp_path / "curves")
    assert sorted(expected) == list(range(1, 13))
    assert losses(resumed / "curves") == expected
    assert os.listdir(resumed / "tables") == []


def test_a_model_trained_with_tables_on_disk_is_evaluated_and_generates_without_their_directory(
    data: str, resumed: Path, tmp_path: Path
) -> None:
    shutil.copytree(resumed / "run", tmp_path / "run")
    load = ["--load", str(tmp_path / "run")]
    evaluated = run_script("tools/evaluate.py", *load, "--data-path", data)
    assert evaluated.returncode == 0, evaluated.stderr
    generated = run_script("tools/generate.py", *load, "--prompt", "1 2", "--max-new-tokens", "4")
    assert generated.returncode == 0, generated.stderr
    # The script itself evaluates with the tables on disk.
    flags = [*SHORT, "--data-path", data, "--split", "80,10,10", "--skip-train", "--eval-iters", "2"]
    found = []
    for place in ([], [*DISK, "--per-layer-offload-dir", str(tmp_path / "tables")]):
        result = run(*flags, *load, *place)
        assert result.returncode == 0, result.stderr
        found.append([line for line in result.stdout.splitlines() if "lm loss" in line])
    assert found[0] and found[0] == found[1]


def test_a_resumed_run_may_keep_its_tables_elsewhere_or_train_them_whole(
    data: str, resumed: Path, tmp_path: Path
) -> None:
    found = {}
    for name, flags in {
        "device": [],
        "cpu": ["--per-layer-offload", "cpu"],
        "whole": ["--no-per-layer-sparse"],
    }.items():
        where = ["--data-path", data, "--load", str(resumed / "run"), "--save", str(tmp_path / name)]
        where += [
            "--train-iters",
            "15",
            "--override-opt-param-scheduler",
            "--tensorboard-dir",
            str(tmp_path / name),
        ]
        result = run(*where, *flags, processes=2)
        assert result.returncode == 0, result.stderr
        assert "after step 12" in result.stdout
        found[name] = losses(tmp_path / name)
    assert found["device"] == found["cpu"]
    assert found["whole"] == pytest.approx(found["device"], rel=1e-5)


WIDE = ["--per-layer-hidden-size", "1024"]  # tables and moments of 2 x 3 x 65 KiB x 4 on two ranks


def test_a_disk_without_room_ends_a_run_at_its_start_with_one_line(data: str, small_disk: Path) -> None:
    where = ["--per-layer-offload-dir", str(small_disk)]
    result = run(*SHORT, *DISK, "--data-path", data, *where, *WIDE, processes=2)
    assert result.returncode == 2 and "step 1/" not in result.stdout
    (error,) = _errors(result.stdout + result.stderr)
    assert error.startswith(f"error: --per-layer-offload-dir {small_disk}: no room for")
    assert "No space left on device" in error and "the tables and their optimizer state take" in error
    assert os.listdir(small_disk) == []


def test_a_disk_that_others_fill_does_not_stop_a_run_whose_tables_are_on_it(
    data: str, small_disk: Path
) -> None:
    where = ["--data-path", data, "--per-layer-offload-dir", str(small_disk)]
    flags = ["--train-iters", "40", "--per-layer-sparse", *DISK, *where]
    alone = [sys.executable, "-u", str(ROOT / "pretrain_gpt_per_layer.py"), *MODEL, *flags]
    with subprocess.Popen(
        alone, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "step 1/" in line:
                fill = ["dd", "if=/dev/zero", f"of={small_disk}/fill", "bs=1k", "count=2000"]
                assert subprocess.run(fill, capture_output=True, check=False).returncode == 1
    assert process.returncode == 0, printed
    assert "step 40/40" in printed


def test_a_directory_that_cannot_be_written_is_named(data: str) -> None:
    where = ["--data-path", data, "--per-layer-offload-dir", "/proc/tables"]
    result = run(*SHORT, *DISK, *where)
    assert result.returncode == 2
    assert _errors(result.stdout + result.stderr) == [
        "error: --per-layer-offload-dir /proc/tables: not writable: No such file or directory"
    ]
