"""`make gpu` on a CPU: every row that needs no GPU is measured, and one that fails leaves the others as they are.

GPU_CHECK=all pytest -q tests/integration/scripts/test_gpu_check.py    # with the whole table: minutes
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.testing.warm_python.warm_server import warm_python
from tests.integration.rehearsal.rehearsal_flags import needs_device

ROOT = Path(__file__).parents[3]
FAMILIES = ("PLE", "NPT", "progressive")
CPU = ("--device", "cpu", "--size", "tiny")


def check(
    folder: Path, *flags: str, path: Path = ROOT, interpreter: str = sys.executable
) -> tuple[int, dict[str, Any], str]:
    """Exit code, rows by name, and output of benchmarks/gpu/check.py."""
    rows = folder / "rows.json"
    command = ["benchmarks/gpu/check.py", "--output", str(rows), *flags]
    done = python(*command, path=path, interpreter=interpreter)
    found = json.loads(rows.read_text(encoding="utf-8"))["rows"] if rows.exists() else []
    return done.returncode, {row["name"]: row for row in found}, done.stdout + done.stderr


def python(
    *command: str, path: Path = ROOT, interpreter: str = sys.executable
) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [interpreter, *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1600
    )


@pytest.mark.skipif(os.environ.get("GPU_CHECK") != "all", reason="takes minutes; GPU_CHECK=all runs it")
@needs_device
def test_every_row_that_needs_no_gpu_is_measured_on_a_cpu(tmp_path: Path) -> None:
    figures = str(tmp_path / "rehearsed.json")
    made = python(
        *(
            "-m",
            "megatron_ext.rehearsal",
            "benchmarks/gpu/rehearsed.py",
            "--sizes",
            "tiny",
            "--output",
            figures,
        )
    )
    assert made.returncode == 0, made.stderr
    code, rows, output = check(tmp_path, *CPU, "--rehearsed", figures, "--jobs", "2", "--minutes", "25")
    assert code == 0, output
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    for family in FAMILIES:
        assert verdicts.pop(f"{family}: torchrun, resume") == "ok"
        assert verdicts.pop(f"{family}: CPU and cpu") == "ok"
        assert verdicts.pop(f"{family}: peak memory") == "ok", "rehearsed and measured peaks are within 5 %"
        assert verdicts.pop(f"{family}: waits") == "skipped"
        assert rows[f"{family}: waits"]["result"].startswith("needs CUDA; rehearsed ")
    assert verdicts.pop("PLE: tensor parallel over 2") == "ok"
    assert {name.partition(" ")[0].rstrip(":,") for name in verdicts} == {
        "attention",
        "cross-entropy",
        "speed",
    }
    assert set(verdicts.values()) == {"measured"}
    assert "mcore" in output and "tokens/s" in output


def test_a_model_that_fails_gives_its_reason_and_the_others_their_times(tmp_path: Path) -> None:
    # A machine without Hugging Face's package.
    (tmp_path / "transformers.py").write_text("raise ImportError('transformers is not installed')\n")
    flags = (*CPU, "--only", "mcore", "PLE: waits")
    code, rows, output = check(tmp_path, *flags, path=tmp_path, interpreter=warm_python())
    assert code == 1, output
    assert rows["speed: hugging face"]["verdict"] == "FAILED"
    assert rows["speed: hugging face"]["result"].endswith("transformers is not installed")
    others = {name: row["verdict"] for name, row in rows.items() if name != "speed: hugging face"}
    assert others == {
        "PLE: peak memory": "skipped",
        "PLE: waits": "skipped",
        **{f"speed: {name}": "measured" for name in ("ours", "mcore", "ours + PLE", "ours + NPT")},
    }


def test_a_row_that_is_over_its_time_is_ended_and_fails(tmp_path: Path) -> None:
    code, rows, _ = check(tmp_path, *CPU, "--only", "torchrun", "kernels", "--minutes", "0.001")
    assert code == 1
    assert {row["verdict"] for row in rows.values()} == {"FAILED"}
    assert all(row["result"].endswith("was ended at its time limit") for row in rows.values())
    assert len(rows) == len(FAMILIES) + 1


def test_without_a_gpu_the_check_says_so_in_one_line(tmp_path: Path) -> None:
    code, rows, output = check(tmp_path)
    assert code == 2 and not rows
    assert output.startswith("error: --device cuda: torch ") and output.count("\n") == 1
