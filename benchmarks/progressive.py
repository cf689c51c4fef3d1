#!/usr/bin/env python3
"""Measures what progressive training saves: compares time, memory and loss with end-to-end training and G_stack.

    python benchmarks/progressive.py     12 layers in 3 stacks of 4, h=512, f=1536, V=8192, s=256; 40 minutes, all cores

The model grows by one stack (a group of layers) at a time; the trunk is all earlier stacks. The strategies are:

    frozen + cache      stacks on a frozen trunk whose output is cached
    frozen              the same without the cache
    qlora               stacks on a 4-bit trunk (NF4) with trainable adapters
    g_stack             new stacks are copies of the last one, and all layers train (arXiv 2405.15319)
    end to end          all layers train from the start

All strategies train on the same sequences in the same order, for the same number of steps; every new stack is a copy of
the last one. The time of a step excludes start-up, evaluation and checkpoints. The strategies take turns stack by
stack, so that changes in the machine's speed affect all of them. Each stack trains on its sequences for `epochs`
epochs: the first epoch fills the cache, the others read it.

Memory is measured in two ways: the peak resident memory of a process that trains one stack; and the peak bytes of live
tensors (weights, gradients, optimizer state and activations) in a run of two steps per stack, which is what a GPU would
need.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_ext.config.command_line.field_checks import check_at_least
from megatron_ext.config.command_line.parse import parse, run_main

ROOT = Path(__file__).parents[1]
STRATEGIES = {
    "frozen_cache": ("--no-qlora-enabled",),
    "frozen": ("--no-qlora-enabled", "--no-cache-activations"),
    "qlora": (
        *("--trunk-strategy", "qlora", "--trunk-precision", "qlora", "--no-cache-activations"),
        *("--qlora-rank", "16", "--progressive-qlora-rank", "8"),
    ),
    "g_stack": ("--trunk-strategy", "trained", "--no-qlora-enabled", "--no-cache-activations"),
    "end_to_end": ("--no-enabled", "--no-qlora-enabled", "--no-cache-activations"),
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the shape of the model and the length of the measurement."""

    output_dir: str = "runs/benchmark_progressive"
    """Directory for the corpus, checkpoints, event files and report. An interrupted benchmark continues there."""

    hidden_size: int = 512
    """Hidden size (h)."""

    ffn_hidden_size: int = 1536
    """FFN size (f)."""

    seq_length: int = 256
    """Tokens per sequence (s)."""

    vocab_size: int = 8192
    """Vocabulary size of the tokenizer (V)."""

    stacks: int = 3
    """Number of stacks."""

    n_blocks: int = 4
    """Layers per stack."""

    batch_size: int = 16
    """Sequences per step, in one micro-batch."""

    stack_steps: int = 24
    """Steps per stack. End-to-end training runs the same total number of steps."""

    epochs: int = 2
    """Number of times that a stack trains on each of its sequences."""

    strategies: tuple[str, ...] = tuple(STRATEGIES)
    """Strategies to run; end_to_end is the one with which the others are compared."""

    count: str | None = None
    """Internal: train this strategy briefly and print the peak bytes of its tensors."""

    def __post_init__(self) -> None:
        for name in self.strategies:
            if name not in STRATEGIES:
                raise ValueError(f"--strategies {name}: must be one of {', '.join(STRATEGIES)}")
        check_at_least(self, 1, "hidden_size", "seq_length", "stacks", "n_blocks", "batch_size", "epochs")
        if self.stack_steps < 1 or self.stack_steps % self.epochs:
            raise ValueError(
                f"--stack-steps {self.stack_steps}: must be a multiple of --epochs {self.epochs}"
            )


def main() -> None:
    """Trains every strategy stack by stack, evaluates, and prints the report."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/progressive.py",
        description="Measure what progressive training saves: time, memory and loss per stack.",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    out = Path(config.output_dir)
    if config.count is not None:
        _count(config, out, config.count)
        return
    _prepare_data(config, out)
    for _ in range(config.stacks):
        for name in config.strategies:
            _run("pretrain_progressive.py", *_flags(config, out, name))
    for name in config.strategies:
        _run("tools/evaluate.py", "--load", str(out / name / "progressive_rack"), "--data-path",
             str(out / "held_out_text_document"), "--max-tokens", "60000",
             "--output", str(out / name / "evaluation.json"))  # fmt: skip
    runs = [f"{name}={out / name}" for name in config.strategies]
    _run("tools/progressive_report.py", "--reference", "end_to_end", "--html", str(out / "report.html"),
         "--output", str(out / "report.json"), "--runs", *runs)  # fmt: skip
    _print_tensors(config, out)


def _print_tensors(config: BenchmarkConfig, out: Path) -> None:
    """Prints the peak bytes of live tensors of every strategy; each is counted in its own process."""
    shape = [
        f"--{field.name.replace('_', '-')}={getattr(config, field.name)}"
        for field in fields(BenchmarkConfig)
        if isinstance(getattr(config, field.name), int)
    ]
    found = {}
    for name in config.strategies:
        command = [sys.executable, __file__, *shape, f"--output-dir={out}", f"--count={name}"]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
        found[name] = int(lines[-1])
    for name, size in found.items():
        ratio = f", {size / found['end_to_end']:.3f} times end_to_end" if "end_to_end" in found else ""
        print(f"{name}: at most {size / 2**20:.0f} MiB of tensors{ratio}")


def _count(config: BenchmarkConfig, out: Path, name: str) -> None:
    """Trains all stacks for two steps each in this process; the last printed line is the peak bytes of tensors."""
    from megatron_ext.platform.allocations import AllocationCounter
    from megatron_ext.progressive.runs.progressive_run import run_progressive
    from megatron_ext.progressive.settings.progressive_run_config import ProgressiveRunConfig, stack_defaults

    short = replace(config, stack_steps=2, epochs=1)
    with tempfile.TemporaryDirectory() as folder:
        changed = {"save": folder, "tensorboard-dir": None, "exit-interval": None, "lr-warmup-iters": 0}
        flags = _flags(
            short, out, name, {**changed, "eval-interval": 1000, "eval-iters": 0, "split": "100,0,0"}
        )
        run = parse(ProgressiveRunConfig, flags, find=lambda given: [stack_defaults(given)])
        with AllocationCounter() as counter:
            run_progressive(run)
        print(counter.peak)


def _prepare_data(config: BenchmarkConfig, out: Path) -> None:
    if (out / "held_out_text_document.idx").exists():
        return
    train, held_out, tokenizer = out / "train.jsonl", out / "held_out.jsonl", out / "tokenizer"
    out.mkdir(parents=True, exist_ok=True)
    _run("tools/build_corpus.py", "--output", str(train), "--held-out", str(held_out), "--max-bytes", "8000000",
         "--held-out-fraction", "0.1")  # fmt: skip
    _run("tools/train_tokenizer.py", "--input", str(train), "--output-dir", str(tokenizer), "--vocab-size",
         str(config.vocab_size))  # fmt: skip
    for path in (train, held_out):
        _run("tools/preprocess_data.py", "--input", str(path), "--output-prefix", str(path.with_suffix("")),
             "--append-eod", "--vocab-file", str(tokenizer / "vocab.json"),
             "--merge-file", str(tokenizer / "merges.txt"))  # fmt: skip


def _flags(
    config: BenchmarkConfig, out: Path, name: str, changed: Mapping[str, object] | None = None
) -> list[str]:
    """Returns the flags that train the next stack, or for end_to_end the same number of steps.

    Args:
        config: shape and length of the benchmark.
        out: directory of the benchmark.
        name: the strategy.
        changed: maps a flag to the value that replaces its usual value; None leaves the flag out.
    """
    sequences = config.stack_steps * config.batch_size // config.epochs
    values: dict[str, object] = {
        "hidden-size": config.hidden_size,
        "ffn-hidden-size": config.ffn_hidden_size,
        "num-attention-heads": max(1, config.hidden_size // 64),
        "seq-length": config.seq_length,
        "hidden-dropout": 0,
        "attention-dropout": 0,
        "n-blocks": config.n_blocks,
        "target-stacks": config.stacks,
        "training-objective": "clm",
        "growth-init": "copy",
        "stack-steps": config.stack_steps,
        "exit-interval": config.stack_steps,
        "epoch-samples": sequences,
        "micro-batch-size": config.batch_size,
        "global-batch-size": config.batch_size,
        "lr": 1e-3,
        "min-lr": 1e-4,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": 5,
        "weight-decay": 0.1,
        "adam-beta2": 0.95,
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": out / "tokenizer" / "tokenizer.json",
        "data-path": out / "train_text_document",
        "split": "97,3,0",
        "data-cache-path": out / "cache",
        "num-workers": 0,
        "eval-interval": max(1, config.stack_steps // 3),
        "eval-iters": 2,
        "log-interval": 1,
        "save": out / name,
        "tensorboard-dir": out / name / "tensorboard",
    }
    values |= changed or {}
    flags = [f"--{flag}={value}" for flag, value in values.items() if value is not None]
    return [*flags, "--swiglu", "--disable-bias-linear", "--log-memory", *STRATEGIES[name]]


def _run(script: str, *arguments: str) -> None:
    print("$ python", script, *arguments, flush=True)
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


if __name__ == "__main__":
    run_main(main)
