"""Example scripts empty only a directory of their own: another one is refused, with its files left in place."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "script",
    [
        "quickstart.sh",
        "npt/quickstart.sh",
        "npt/toy.sh",
        "progressive/quickstart.sh",
        "gemma/quickstart.sh",
        "data/main_job.sh",
    ],
)
def test_a_directory_with_other_files_is_refused_and_left_alone(script: str, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    environment = {
        **os.environ,
        "PYTHON": "false",
        "OUT": str(tmp_path),
        "MODEL": "model",
    }  # false: whatever runs next fails
    arguments = ["bash", str(ROOT / "examples" / script)] + ([] if "main_job" in script else [str(tmp_path)])
    ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert f"error: {tmp_path}: holds files that this script did not make" in ended.stderr
    assert thesis.read_text() == "years of work"


def test_a_directory_that_an_earlier_run_made_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "old").write_text("")
    script = str(ROOT / "examples" / "quickstart.sh")
    environment = {**os.environ, "PYTHON": "false"}
    subprocess.run(["bash", script, str(tmp_path)], env=environment, capture_output=True, timeout=60)
    assert not (tmp_path / "old").exists() and (tmp_path / "tokenizer").is_dir()
