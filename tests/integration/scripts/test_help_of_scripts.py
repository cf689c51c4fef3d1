"""`--help` of every script, tool and benchmark answers at once, without importing torch and the engine (seconds)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = [
    path
    for place in ("pretrain_*.py", "tools/*.py", "benchmarks/*.py")
    for path in sorted(ROOT.glob(place))
    if path.name != "run_lm_eval.py"  # its command line is lm_eval's, which imports torch first
]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_help_comes_without_torch(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", path, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.split("\n")}
    assert "dataclasses" in imported
    assert not imported & {"torch", "megatron", "transformers"}
