"""Runs of `pretrain_progressive.py` in processes of the tests, and what they leave, read by megatron-core's reader."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.platform import process_groups
from megatron_ext.testing.checkpoint_runs import read_plain
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint

ROOT = Path(__file__).parents[3]
VOCABULARY = 64
FLAGS = shlex.split(
    "--hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 16 --swiglu --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 --init-method-std 0.1 --tokenizer-type NullTokenizer "
    f"--vocab-size {VOCABULARY} --num-workers 0 --eval-iters 0 --log-interval 1 --device-peak-tflops 1 "
    "--split 90,10,0 --lr 1e-2 --micro-batch-size 2 --global-batch-size 4 --training-objective clm --n-blocks 2 "
    "--qlora-rank 4 --progressive-qlora-rank 2"
)


def write_data(folder: Path) -> str:
    """An indexed dataset of random documents; its prefix."""
    prefix = str(folder / "corpus")
    random = np.random.default_rng(1)
    write_dataset(prefix, [[random.integers(0, VOCABULARY, 40).tolist()] for _ in range(60)])
    return prefix


def train(data: str, save: str, *flags: str) -> tuple[int, str]:
    """Exit code and output of `pretrain_progressive.py`; in a process of `run_distributed`, on every rank.

    Raises:
        ValueError, OSError: a user's mistake, as the script's main raises it.
        SystemExit: one that the command line finds.
    """
    # The tests' processes join one process group only.
    process_groups.shutdown = lambda: None
    output, argv = io.StringIO(), sys.argv
    sys.argv = ["pretrain_progressive.py", *FLAGS, "--data-path", data, "--save", save, *flags]
    try:
        with contextlib.redirect_stdout(output):
            return script().main(), output.getvalue()
    finally:
        sys.argv = argv


def script() -> Any:
    """The script as a module."""
    name = "pretrain_progressive"
    specification = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def losses_of(output: str) -> list[float]:
    """The printed losses, step by step."""
    return [float(loss) for loss in re.findall(r"^step .* lm loss ([\d.]+)", output, re.MULTILINE)]


def stored(save: str | Path, phase: str) -> dict[str, torch.Tensor]:
    """All tensors of a phase's newest checkpoint, whole; needs a process group."""
    folder = find_checkpoint(str(Path(save) / phase))
    assert folder is not None
    return read_plain(str(folder))


def join() -> None:
    """Makes this process one that may read checkpoints."""
    process_groups.initialize(ParallelConfig(), seed=1)
