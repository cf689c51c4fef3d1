#!/usr/bin/env python3
"""Measures how much a save slows training: a save that training waits for, and one beside training (`--async-save`).

    python benchmarks/checkpoints.py                                    one process, all cores
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/checkpoints.py        two, tensor parallel

Every round times, in turn, steps without a save, a save that training waits for, and a save during further steps, so
that changes in the machine's speed affect all of them. A ratio is computed for each round; the table shows medians over
the rounds. The first round is not counted, because it allocates the memory for the copied tensors.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig

if TYPE_CHECKING:
    from megatron_ext.training.checkpoint.checkpointer import Checkpointer
    from megatron_ext.training.engine.training_step import Stepper
    from megatron_ext.training.interface.family_interface import Batch


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the shape of the model and the length of the measurement."""

    hidden_size: int = 512
    """Hidden size (h)."""

    num_layers: int = 4
    """Number of layers."""

    seq_length: int = 256
    """Tokens per sequence (s)."""

    micro_batch_size: int = 1
    """Sequences per step (b)."""

    vocab_size: int = 8192
    """Vocabulary size (V)."""

    steps: int = 10
    """Steps without a save in every round."""

    rounds: int = 7
    """Number of counted rounds."""

    folder: str | None = None
    """Directory for the checkpoints, on the file system to measure; the files are removed at the end. Default: the
    system's directory for temporary files.
    """


@dataclass
class Round:
    """Seconds of one round."""

    plain_step: float
    """Median of the steps without a save."""

    sync_save: float
    """Duration of the save that training waits for."""

    copy: float
    """Seconds that training waits while the tensors are copied, at the beginning of a save beside training."""

    steps: list[float]
    """Duration of each step during the save, plus the save's own work on the main thread after the step."""

    async_save: float
    """Seconds from the beginning of a save beside training to the complete checkpoint."""


def main() -> None:
    """Runs the benchmark and prints its table on rank 0."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/checkpoints.py",
        description="Measure how much a save slows training, with and without --async-save.",
    )
    from megatron_ext.platform import process_groups
    from megatron_ext.platform.collectives import is_first_rank, on_first_rank

    parallel = ParallelConfig(tensor_model_parallel_size=process_groups.world_size())
    process_groups.initialize(parallel, seed=1)
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        stepper, checkpointer = _build(config, parallel, on_first_rank(lambda: folder))
        batches = _batches(config)
        rounds = [
            _round(config, stepper, checkpointer, batches, number) for number in range(config.rounds + 1)
        ]
        size = (
            sum(path.stat().st_size for path in Path(folder).rglob("*.distcp")) / 2
        )  # the two saves of a round
    if is_first_rank():
        _print(config, rounds[1:], size)
    process_groups.shutdown()


def _round(
    config: BenchmarkConfig,
    stepper: "Stepper",
    checkpointer: "Checkpointer",
    batches: "Iterator[Batch]",
    number: int,
) -> Round:
    from megatron_ext.training.checkpoint.checkpointer import TrainingProgress

    def step() -> float:
        started = time.perf_counter()
        stepper.train(batches, 1)
        return time.perf_counter() - started

    plain = [step() for _ in range(config.steps)]
    started = time.perf_counter()
    checkpointer.save(TrainingProgress(iteration=2 * number + 1))
    sync_save = time.perf_counter() - started
    step()
    started = time.perf_counter()
    checkpointer.begin_save(TrainingProgress(iteration=2 * number + 2))
    copied = time.perf_counter()
    beside, complete = [], False
    while not complete:
        began = time.perf_counter()
        step()
        complete = checkpointer.proceed_with_save(wait=False)
        beside.append(time.perf_counter() - began)
    ended = time.perf_counter()
    return Round(statistics.median(plain), sync_save, copied - started, beside, ended - started)


def _build(config: BenchmarkConfig, parallel: ParallelConfig, folder: str) -> "tuple[Stepper, Checkpointer]":
    from megatron_ext.models.build_model import build_model
    from megatron_ext.training.checkpoint.checkpointer import Checkpointer
    from megatron_ext.training.engine.data_parallel import wrap_model
    from megatron_ext.training.engine.lr_schedule import build_scheduler
    from megatron_ext.training.engine.optimizer import build_optimizer
    from megatron_ext.training.engine.training_step import Stepper

    model = ModelConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.hidden_size // 64,
        seq_length=config.seq_length,
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    )
    settings, training = OptimizerSettings(lr=1e-4), TrainingConfig(train_iters=10**6)
    chunks = build_model(model, parallel, vocab_size=config.vocab_size, seed=1, extensions=[])
    wrapped = wrap_model(chunks, parallel)
    optimizer = build_optimizer(settings, parallel, wrapped, [])
    scheduler = build_scheduler(settings, training, optimizer, config.micro_batch_size)
    stepper = Stepper(
        wrapped,
        [],
        optimizer,
        scheduler,
        global_batch_size=config.micro_batch_size,
        micro_batch_size=config.micro_batch_size,
        clip_grad=1.0,
    )
    checkpointer = Checkpointer(
        CheckpointConfig(save=folder, keep_last=2),
        chunks=stepper.chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        run_config={"vocab_size": config.vocab_size, "tokenizer_fingerprint": ""},
        families=[],
    )
    return stepper, checkpointer


def _batches(config: BenchmarkConfig) -> "Iterator[Batch]":
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (config.micro_batch_size, config.seq_length)
    while True:
        tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
        yield {
            "tokens": tokens,
            "labels": tokens.roll(-1, 1),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(config.seq_length).expand(shape),
        }


def _print(config: BenchmarkConfig, rounds: list[Round], size: float) -> None:
    import torch
    import torch.distributed as dist

    from megatron_ext.platform.process_groups import use_cuda

    device = torch.cuda.get_device_name() if use_cuda() else f"CPU, {torch.get_num_threads()} threads each"
    table = Table(
        title=f"{dist.get_world_size()} process(es), {device}: h={config.hidden_size}, {config.num_layers} layers, "
        f"s={config.seq_length}, b={config.micro_batch_size}, V={config.vocab_size}; "
        f"checkpoint {size / 2**20:.0f} MiB; medians of {len(rounds)} rounds"
    )
    for column in ("", "seconds", "in steps"):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, seconds: list[float]) -> None:
        steps = statistics.median(s / r.plain_step for s, r in zip(seconds, rounds, strict=True))
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{steps:.2f}")

    row("step without a save", [r.plain_step for r in rounds])
    row("save that training waits for", [r.sync_save for r in rounds])
    row("save beside training: training waits for the copy", [r.copy for r in rounds])
    row("    step during the save, median", [statistics.median(r.steps) for r in rounds])
    row("    step during the save, mean", [statistics.mean(r.steps) for r in rounds])
    row("    slowest step during the save", [max(r.steps) for r in rounds])
    row("    time lost by training: copy and slower steps", [r.copy + _lost(r) for r in rounds])
    row("    from its beginning to the complete checkpoint", [r.async_save for r in rounds])
    Console(width=120).print(table)


def _lost(one: Round) -> float:
    return sum(one.steps) - len(one.steps) * one.plain_step


if __name__ == "__main__":
    run_main(main)
