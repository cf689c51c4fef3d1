#!/usr/bin/env python3
"""Trains the three families with several versions of megatron-core; compares losses, and exchanges checkpoints.

    python benchmarks/engines/compare.py --engines .venv/bin/python .venv-newest/bin/python

An engine is a Python interpreter whose environment has this package's dependencies. PYTHON:FOLDER takes megatron-core
from FOLDER instead (`pip install --no-deps --target FOLDER megatron-core==0.17.1`). For each family:

    train       every engine trains the same model for STEPS steps and saves a checkpoint
    hand over   every engine trains STEPS more from the first engine's checkpoint, and the first from every engine's

Losses are compared as TensorBoard stores them, in fp32 and to the last bit. The exit code is 1 if some differ.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.field_checks import check_positive
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.reports.events import read_curves

ROOT = Path(__file__).resolve().parents[2]
LOSS = "lm loss"
DATA = (
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --lr-decay-style constant --eval-iters 0 --log-interval 1 "
    "--device-peak-tflops 1 --num-workers 0 --split 100,0,0"
)
MODEL = (
    "--hidden-size 32 --num-attention-heads 4 --num-query-groups 2 --seq-length 16 --swiglu --disable-bias-linear "
    "--tokenizer-type NullTokenizer --vocab-size 64 --init-method-std 0.1"
)
BASE = f"pretrain_gpt_per_layer.py {MODEL} --num-layers 4"
FAMILIES = {
    "PLE": f"{BASE} --use-per-layer-embedding --per-layer-preset gemma4 --per-layer-hidden-size 8",
    "NPT": "pretrain_npt.py --mode multi_layer --npt-layers upper_half --np-rank 4 --base-checkpoint {base}",
    "progressive": f"pretrain_progressive.py {MODEL} --training-objective clm --n-blocks 2 --target-stacks 2 "
    "--trunk-strategy qlora --qlora-rank 4 --progressive-qlora-rank 2",
}
WRITE_DATA = """
import sys, numpy
from megatron_ext.testing.tiny_datasets import write_dataset
random = numpy.random.default_rng(1)
write_dataset(sys.argv[1], [[random.integers(0, 64, 40).tolist()] for _ in range(60)])
"""
VERSIONS = (
    "import sys, torch, megatron.core as m; print(sys.version.split()[0], torch.__version__, m.__version__)"
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Flags of the comparison."""

    engines: tuple[str, ...] = ()
    """Interpreters to compare, as PYTHON or PYTHON:FOLDER; the first exchanges checkpoints with each of the others."""

    processes: int = 1
    """Processes of a run. With several, the run uses tensor parallelism of size 2 and the distributed optimizer."""

    steps: int = 4
    """Number of steps before the checkpoint; the same number follows after it."""

    def __post_init__(self) -> None:
        check_positive(self, "processes", "steps")
        if len(self.engines) < 2:
            raise ValueError(
                f"--engines: needs at least two interpreters to compare, got {len(self.engines)}"
            )


@dataclass(frozen=True)
class Engine:
    """An interpreter, and the folder that its megatron-core comes from."""

    given: str
    """PYTHON or PYTHON:FOLDER, as in `--engines`."""

    def run(self, *arguments: str, processes: int = 1) -> str:
        """Runs Python with these arguments; returns what it prints.

        Raises:
            ValueError: the command failed; the message contains the end of its output.
        """
        python, _, folder = self.given.partition(":")
        paths = [str(Path(folder).resolve())] if folder else []
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [python, *(launcher if processes > 1 else []), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-2000:]}")
        return done.stdout

    @cached_property
    def name(self) -> str:
        """Versions of Python, torch and megatron-core."""
        return "Python {}, torch {}, megatron-core {}".format(*self.run("-c", VERSIONS).split())


class Comparison:
    """The runs of one family, which share a command and a folder."""

    def __init__(self, config: CompareConfig, family: str, command: str, folder: Path) -> None:
        self.config = config
        self.family = family
        self.command = f"{command} {DATA} --data-path {folder}/corpus".format(base=folder / "base").split()
        self.folder = folder / family
        if config.processes > 1:
            self.command += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
            self.command += ["--use-distributed-optimizer", "--overlap-grad-reduce"]

    def train(self, engine: Engine, name: str, *, start: str | None = None) -> list[float]:
        """Trains from scratch, or continues the run `start`; returns the losses of the steps that this call trained."""
        save = self.folder / name
        if start is not None:
            shutil.copytree(self.folder / start, save)
        before = self.losses(save)
        steps = self.config.steps
        length = f"--stack-steps {steps}" if self.family == "progressive" else f"--train-iters {2 * steps}"
        stop = "" if start is not None else f"--exit-interval {steps}"
        where = f"--save {save} --tensorboard-dir {save}/tensorboard"
        load = "" if start is None or self.family == "progressive" else f"--load {save}"
        engine.run(*self.command, *f"{length} {stop} {where} {load}".split(), processes=self.config.processes)
        return self.losses(save)[len(before) :]

    def losses(self, save: Path) -> list[float]:
        """Returns the losses of all steps that a run has logged."""
        if not (save / "tensorboard").exists():
            return []
        return read_curves(save / "tensorboard", required=LOSS)[LOSS][1]


def compare(comparison: Comparison, engines: list[Engine]) -> list[tuple[str, str, str, bool]]:
    """Trains a family with all engines; returns rows (family, description, losses, whether they are as expected)."""
    first, rows = engines[0], []
    trained = [comparison.train(engine, f"engine{number}") for number, engine in enumerate(engines)]
    for engine, found in zip(engines, trained, strict=True):
        rows.append((f"trained by {engine.name}", found, trained[0]))
    expected = comparison.train(first, "engine0_engine0", start="engine0")
    rows.append((f"continued by {first.name}", expected, expected))
    for number, engine in list(enumerate(engines))[1:]:
        there = comparison.train(engine, f"engine0_engine{number}", start="engine0")
        back = comparison.train(first, f"engine{number}_engine0", start=f"engine{number}")
        rows.append((f"continued by {engine.name}", there, expected))
        rows.append((f"continued from {engine.name} by the first", back, expected))
    return [
        (comparison.family, text, " ".join(f"{loss:.9g}" for loss in found), bool(found) and found == wanted)
        for text, found, wanted in rows
    ]


def main() -> int:
    """Runs the comparison and prints its table; returns the exit code."""
    config: CompareConfig = parse(
        CompareConfig,
        prog="benchmarks/engines/compare.py",
        description="Compare losses and exchange checkpoints between versions of megatron-core.",
    )
    engines = [Engine(given) for given in config.engines]
    table = Table("family", "", "losses", "equal")
    all_equal = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines[0].run("-c", WRITE_DATA, f"{folder}/corpus")
        base = f"{BASE} {DATA} --data-path {folder}/corpus --train-iters 4 --save {folder}/base"
        engines[0].run(*base.split())
        for family, command in FAMILIES.items():
            for row in compare(Comparison(config, family, command, folder), engines):
                table.add_row(*row[:3], "yes" if row[3] else "NO")
                all_equal &= row[3]
            table.add_section()
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0 if all_equal else 1


if __name__ == "__main__":
    run_main(main)
