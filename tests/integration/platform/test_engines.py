"""Newer versions of megatron-core than the installed one: the same losses, each other's checkpoints, and silence.

`make install` unpacks them into a folder that only these tests look into. They are made for Python 3.12 and later; what
a model needs of them also runs on Python 3.11, except the compiled part of their datasets.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.torchrun import environment
from tests.integration.platform.engine_run import STEPS, continued, trained

FOLDER = Path(sys.prefix, "engines")
VERSIONS = ("0.17.1", "0.18.2", "0.19.2")


@dataclass(frozen=True)
class Run:
    """What `engine_run` found, what it left, and what it said beside that."""

    found: dict[str, Any]
    checkpoint: str
    said: str


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    checkpoint = str(tmp_path_factory.mktemp("installed"))
    return Run(run_single(trained, checkpoint), checkpoint, "")


@pytest.fixture(scope="module", params=VERSIONS)
def newer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, installed: Run) -> Run:
    engine, checkpoint = FOLDER / request.param, str(tmp_path_factory.mktemp("newer"))
    if not engine.exists():
        pytest.skip(f"{engine}: missing; make install unpacks it where Python is at least 3.11")
    variables = environment()
    variables["PYTHONPATH"] = f"{engine}:{variables['PYTHONPATH']}"
    script = str(Path(__file__).with_name("engine_run.py"))
    done = subprocess.run(
        [sys.executable, script, checkpoint, installed.checkpoint],
        env=variables,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # In a git checkout, engines of 0.18 and later add its commit.
    assert found["version"].partition("+")[0] == request.param
    # torch says this where CUDA's compiler is installed and no GPU is.
    said = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]
    return Run(found, checkpoint, "\n".join(said))


def test_losses_and_generated_tokens_are_the_installed_engines_to_the_last_bit(
    newer: Run, installed: Run
) -> None:
    assert len(set(installed.found["losses"])) == 2 * STEPS
    assert newer.found["losses"] == installed.found["losses"]
    assert newer.found["tokens"] == installed.found["tokens"]


def test_each_engine_goes_on_from_the_others_checkpoint(newer: Run, installed: Run) -> None:
    expected = installed.found["losses"][STEPS:]
    assert newer.found["continued"] == expected
    assert run_single(continued, newer.checkpoint) == expected


def test_the_engine_warns_of_nothing(newer: Run) -> None:
    assert newer.said == ""
