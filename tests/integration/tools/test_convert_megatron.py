"""tools/convert_checkpoint.py with --format megatron as a user calls it, and the training that goes on from its result."""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset
from tools.convert_checkpoint import ExportConfig, ImportConfig

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "tests/distributed/checkpoint/kept_megatron"
STEP = re.compile(r"step (\d)/6 \| lm loss (\S+) \|")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ours`: the kept checkpoint of Megatron-LM, imported with its optimizer; `data`: a dataset of its ids."""
    path = tmp_path_factory.mktemp("megatron")
    arguments = ["import", "--format", "megatron", "--with-optimizer", "--model-dir", str(KEPT)]
    told = run_script("tools/convert_checkpoint.py", [*arguments, "--save", str(path / "ours")]).stdout
    assert "to continue after step 3, with the run's own flags:" in told
    random = np.random.default_rng(1)
    write_dataset(str(path / "data"), [[random.integers(0, 96, 60).tolist()] for _ in range(20)])
    return path
