"""Runs of `pretrain_npt.py` in processes of the tests: a base checkpoint, data, and the script's main with flags."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.run_config import RunConfig
from megatron_ext.platform import process_groups
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.pretrain import pretrain

ROOT = Path(__file__).parents[3]
VOCABULARY = 64
DATA = [
    *("--num-workers", "0", "--eval-iters", "0", "--log-interval", "1", "--device-peak-tflops", "1"),
    *("--split", "90,10,0"),
]
MODEL = [
    *(
        "--num-layers",
        "4",
        "--hidden-size",
        "32",
        "--num-attention-heads",
        "4",
        "--seq-length",
        "16",
        "--swiglu",
    ),
    *(
        "--disable-bias-linear",
        "--hidden-dropout",
        "0",
        "--attention-dropout",
        "0",
        "--init-method-std",
        "0.1",
    ),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY), *DATA),
]
MULTI_LAYER = [
    *("--mode", "multi_layer", "--npt-layers", "upper_half", "--np-rank", "4", "--npt-log-interval", "1"),
    *("--lr", "1e-2", "--batch_size", "2", "--global-batch-size", "4", *DATA),
]


def write_data(folder: Path) -> str:
    """An indexed dataset of random documents; its prefix."""
    prefix = str(folder / "corpus")
    random = np.random.default_rng(1)
    write_dataset(prefix, [[random.integers(0, VOCABULARY, 40).tolist()] for _ in range(60)])
    return prefix


def make_base(folder: str, data: str, *more: str) -> str:
    """Trains a base model for a step; the directory of its checkpoint. In a process of `run_distributed`."""
    flags = [
        *MODEL,
        "--lr",
        "1e-2",
        "--train-iters",
        "1",
        "--data-path",
        data,
        "--save",
        f"{folder}/base",
        *more,
    ]
    _stay()
    with contextlib.redirect_stdout(io.StringIO()):
        assert pretrain(parse(RunConfig, flags), lambda config, tokenizer: []) == 0
    return f"{folder}/base"


def train(*flags: str) -> tuple[int, str]:
    """Exit code and output of `pretrain_npt.py`; in a process of `run_distributed`, on every rank.

    Raises:
        ValueError, OSError: a user's mistake, as the script's main raises it.
    """
    _stay()
    output, argv = io.StringIO(), sys.argv
    sys.argv = ["pretrain_npt.py", *flags]
    try:
        with contextlib.redirect_stdout(output):
            return _script().main(), output.getvalue()
    finally:
        sys.argv = argv


def _script() -> Any:
    specification = importlib.util.spec_from_file_location("pretrain_npt", ROOT / "pretrain_npt.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _stay() -> None:
    """Keeps the process group for the next run: the tests' processes join one only."""
    process_groups.shutdown = lambda: None
