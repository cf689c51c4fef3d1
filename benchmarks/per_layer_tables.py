#!/usr/bin/env python3
"""Measures a training step for per-layer tables of several sizes, trained whole and by rows (--per-layer-sparse).

    python benchmarks/per_layer_tables.py                  h=512, 4 layers, s=512, b=2, p=64, Vp=8k to 1M, fp32
    python benchmarks/per_layer_tables.py --rows 8192 65536 --optimizers adam lazy_adam --bf16

Vp: rows of a table, p: its columns; h: hidden size, s: tokens per sequence, b: sequences per step.

Each variant has its own process, which works while the others wait. For every Vp a round times each variant once, in
turn, and with them the reference: tables of the first Vp, trained whole. A ratio is computed for each round; the table
shows the median, and the smallest and largest. The ids of a step are drawn uniformly from all rows, so nearly all are
distinct. Before the measurement, the optimizer's state is set as if every row had last been used 1,000 steps ago. With
`adam`, each used row must then catch up on 1,000 steps, which is the most expensive case.

The host of a virtual machine may take away pages that have not been used for some seconds. The guest does not see this,
but waits microseconds for each such page. Here a process is idle while the others are timed. Before its own timed step,
it therefore touches every page of the tables and their state, and runs a step that is not timed.

Memory is the peak of the process. `tables` is the computed size of the tables' weights, gradients and optimizer state;
`rest` is the difference. Tables in files (`:disk`) are in the system's file cache: `tables` is 0, and the peak includes
only those of their pages that the process has touched since it last released its pages.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt import _timed
from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision, TrainingConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig

if TYPE_CHECKING:
    import torch

    from megatron_ext.training.engine.training_step import Stepper
    from megatron_ext.training.interface.family_interface import Batch

WHOLE = "whole"
VOCABULARY = 8192
EARLIER_STEPS = 1000
_PAGE = 4096  # bytes


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the shape of the model and the length of the measurement."""

    rows: tuple[int, ...] = (8192, 65536, 262144, 1048576)
    """Values of Vp; the first one, trained whole, is the reference."""

    optimizers: tuple[str, ...] = ("adam", "lazy_adam", "adam:disk")
    """Optimizers to time for tables that are trained by rows; tables trained whole are timed in any case. `:cpu` or
    `:disk` after a name keeps the tables in host memory or in files (--per-layer-offload)."""

    offload_dir: str = tempfile.gettempdir()
    """Directory for the files of tables with `:disk`."""

    per_layer_hidden_size: int = 64
    """Columns of a table (p)."""

    hidden_size: int = 512
    """Hidden size (h)."""

    num_layers: int = 4
    """Number of layers."""

    seq_length: int = 512
    """Tokens per sequence (s)."""

    micro_batch_size: int = 2
    """Sequences per step (b)."""

    bf16: bool = False
    """Train in bf16 instead of fp32."""

    rounds: int = 15
    """Number of timed rounds; each times every variant once."""

    worker: str | None = None
    """Internal: run as the process of this variant, given as NAME/Vp."""


class Worker:
    """A process that holds one variant and times it on request."""

    def __init__(self, name: str, rows: int) -> None:
        flags = [flag for flag in sys.argv[1:] if not flag.startswith("--worker")]
        command = [sys.executable, __file__, *flags, f"--worker={name}/{rows}"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `close` closes it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def ask(self, part: str) -> float:
        """Returns the measured value of a part: seconds for `step`, bytes for `peak` and `tables`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(part, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the process of a variant has ended: {self._errors.read()[-2000:]}")
        return float(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._errors.close()


def main() -> int:
    """Runs the benchmark and prints its table; returns the exit code."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/per_layer_tables.py",
        description="Measure a training step for per-layer tables of several sizes.",
    )
    if config.worker is not None:
        name, rows = config.worker.split("/")
        _serve(config, name, int(rows))
        return 0
    reference = Worker(WHOLE, config.rows[0])
    table = _table(config)
    for rows in config.rows:
        _measure(config, rows, reference, table)
    reference.close()
    Console(width=120).print(table)
    return 0


def _measure(config: BenchmarkConfig, rows: int, reference: Worker, table: Table) -> None:
    """Times all variants of one Vp, and adds their rows to the table."""
    names = [name for name in (WHOLE, *config.optimizers) if (name, rows) != (WHOLE, config.rows[0])]
    workers = {name: Worker(name, rows) for name in names}
    times: dict[str, list[float]] = {name: [] for name in workers}
    of_reference = []
    for _ in range(config.rounds):
        of_reference.append(reference.ask("step"))
        for name, worker in workers.items():
            times[name].append(worker.ask("step"))
    if WHOLE not in workers:
        table.add_row(f"{rows:,}", WHOLE, *_cells(of_reference, of_reference, reference))
    for name, worker in workers.items():
        table.add_row(f"{rows:,}", name, *_cells(times[name], of_reference, worker))
        worker.close()


def _table(config: BenchmarkConfig) -> Table:
    table = Table(
        title=f"{'bf16' if config.bf16 else 'fp32'}: h={config.hidden_size}, {config.num_layers} layers, "
        f"s={config.seq_length}, b={config.micro_batch_size}, p={config.per_layer_hidden_size}; medians of "
        f"{config.rounds} rounds; ratio to the step with whole tables of {config.rows[0]:,} rows"
    )
    for column in ("Vp", "trained", "step", "ratio", "smallest", "largest", "peak", "tables", "rest"):
        table.add_column(column, justify="left" if column == "trained" else "right")
    return table


def _cells(times: list[float], reference: list[float], worker: Worker) -> list[str]:
    ratios = [time / of_reference for time, of_reference in zip(times, reference, strict=True)]
    peak, tables = (worker.ask(part) / 2**20 for part in ("peak", "tables"))
    shown = [f"{1e3 * statistics.median(times):.1f} ms"]
    shown += [f"{ratio:.3f}" for ratio in (statistics.median(ratios), min(ratios), max(ratios))]
    return [*shown, *(f"{size:,.0f} MiB" for size in (peak, tables, peak - tables))]


def _serve(config: BenchmarkConfig, name: str, rows: int) -> None:
    """Runs in the worker process: answers the requests of `Worker.ask`."""
    from megatron_ext.platform.device_memory import memory_use

    stepper = _stepper(config, name, rows)
    batches = _batches(config, rows)

    def step() -> None:
        stepper.train(batches, 1)

    step()
    _age(stepper)
    step()
    elements = rows * config.per_layer_hidden_size * config.num_layers
    # Gradient in fp32, two moments, and in bf16 weights in both precisions; by rows there is no whole gradient.
    of_element = (14 if config.bf16 else 12) + 4 * (name == WHOLE)
    if name.endswith(":disk"):
        of_element = 0  # in the system's cache of files
    answers: dict[str, Callable[[], float]] = {
        "step": lambda: _timed_warm(step, tables),
        "peak": lambda: float(memory_use().peak),
        "tables": lambda: float(elements * of_element),
    }
    tables = _tables(stepper)
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


def _timed_warm(step: Callable[[], None], tables: "list[torch.Tensor]") -> float:
    """Returns the seconds of a step; before it, touches the memory of the tables and runs a step that is not timed."""
    from megatron_ext.platform.memory.mapped_tensors import release_pages

    for block in (block for tensor in tables for block in tensor.split(1 << 16)):
        block.flatten()[:: _PAGE // block.element_size()].sum()
        release_pages()
    step()
    return _timed(step)


def _tables(stepper: "Stepper") -> "list[torch.Tensor]":
    """Returns tables that are trained by rows, and their state."""
    from megatron_ext.training.interface.own_optimizer import own_optimizers

    held = [held for own in own_optimizers(stepper.optimizer) for held in own.held()]
    return [tensor for each in held for tensor in (each.parameter.detach(), *each.tensors.values())]


def _stepper(config: BenchmarkConfig, name: str, rows: int) -> "Stepper":
    from megatron_ext.models.build_model import build_model
    from megatron_ext.per_layer.per_layer_family import PerLayerFamily
    from megatron_ext.platform.process_groups import initialize
    from megatron_ext.training.engine.data_parallel import wrap_model
    from megatron_ext.training.engine.lr_schedule import build_scheduler
    from megatron_ext.training.engine.optimizer import build_optimizer
    from megatron_ext.training.engine.training_step import Stepper

    parallel, settings = ParallelConfig(), OptimizerSettings(lr=1e-4, weight_decay=0.1)
    precision: Precision = "bf16" if config.bf16 else "fp32"
    initialize(parallel, seed=1)
    family = PerLayerFamily(_per_layer(config, name, rows), vocab_size=VOCABULARY)
    chunks = build_model(
        _model(config),
        parallel,
        vocab_size=VOCABULARY,
        seed=1,
        precision=precision,
        extensions=[family.extension()],
    )
    family.prepare_model(chunks)
    wrapped = wrap_model(chunks, parallel, precision=precision)
    optimizer = build_optimizer(settings, parallel, wrapped, [family], precision=precision)
    training = TrainingConfig(train_iters=10**6)
    size = config.micro_batch_size
    return Stepper(
        wrapped,
        [family],
        optimizer,
        build_scheduler(settings, training, optimizer, size),
        global_batch_size=size,
        micro_batch_size=size,
        clip_grad=1.0,
    )


def _model(config: BenchmarkConfig) -> ModelConfig:
    return ModelConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.hidden_size // 64,
        seq_length=config.seq_length,
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _per_layer(config: BenchmarkConfig, name: str, rows: int) -> PerLayerConfig:
    optimizer, _, offload = name.partition(":")
    return PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_hidden_size=config.per_layer_hidden_size,
        per_layer_vocab_size=rows,
        per_layer_position="after_mlp",
        per_layer_gate_activation="gelu_tanh",
        per_layer_sparse=name != WHOLE,
        per_layer_optimizer="adam" if name == WHOLE else optimizer,  # type: ignore[arg-type]
        per_layer_offload=offload or None,  # type: ignore[arg-type]
        per_layer_offload_dir=config.offload_dir if offload == "disk" else None,
    )


def _age(stepper: "Stepper") -> None:
    """Fills the state of tables that are trained by rows as if all rows had last been used 1,000 steps ago."""
    import torch

    from megatron_ext.platform.memory.mapped_tensors import release_pages
    from megatron_ext.training.interface.own_optimizer import own_optimizers

    applied = torch.tensor(True)
    for optimizer in own_optimizers(stepper.optimizer):
        for held in optimizer.held():
            for name, tensor in held.tensors.items():
                if name in ("exp_avg", "exp_avg_sq"):
                    for block in tensor.split(1 << 16):
                        torch.nn.init.uniform_(block, 1e-6, 2e-6)
                        release_pages()
        for _ in range(EARLIER_STEPS):
            optimizer._missed.record(1e-4, 0.1, applied)
        optimizer._count = optimizer._count + EARLIER_STEPS


def _batches(config: BenchmarkConfig, rows: int) -> "Iterator[Batch]":
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (config.micro_batch_size, config.seq_length)
    while True:
        tokens = torch.randint(0, VOCABULARY, shape, generator=generator)
        yield {
            "tokens": tokens,
            "labels": tokens.roll(-1, 1),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(config.seq_length).expand(shape),
            "per_layer_ids": torch.randint(0, rows, shape, generator=generator),
        }


if __name__ == "__main__":
    run_main(main)
