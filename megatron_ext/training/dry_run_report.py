"""`--dry-run`: prints parameters, memory and FLOPs of a run, computed from its configuration.

No process group and no model are built. The tokenizer is built, because the size of its vocabulary is needed; if there
is no tokenizer yet, pass --tokenizer-type NullTokenizer and --vocab-size. The number of processes is --world-size, or
the environment variable WORLD_SIZE, which `torchrun` sets. Without either, the number of processes is what one copy
of the model needs. If the trained part of the model changes during the run, as under a curriculum, all figures are
for the last step.
"""

import sys
from collections.abc import Callable
from itertools import groupby
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ext.config.cross_checks import planned_processes
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.config.run_config import C, RunConfig
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.models.costs.activation_memory import ParallelLayout
from megatron_ext.models.costs.memory_estimate import StageMemory
from megatron_ext.models.costs.model_cost import (
    ModelCost,
    hardware_flops_per_token,
    training_flops_per_token,
)
from megatron_ext.platform import process_groups
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.logging.progress_line import binary_size, compact
from megatron_ext.training.planned_memory import plan_memory

_PLAIN_WIDTH = 110  # columns if the output is not a terminal


def planned_world_size(config: RunConfig) -> int:
    """Returns the number of processes: --world-size, else WORLD_SIZE, else the number that one copy of the model
    needs.
    """
    return planned_processes(config.rehearsal, config.parallel)


def print_dry_run(
    config: C,
    make_families: Callable[[C, Tokenizer], list[Family]],
    stream: TextIO | None = None,
) -> None:
    """Prints parameters, memory per rank and FLOPs per step, on rank 0.

    Args:
        config: the run's configuration, resolved for `planned_world_size` processes.
        make_families: builds the model families from configuration and tokenizer.
        stream: output stream; None for standard output.

    Raises:
        ValueError: the tokenizer cannot be built, or a model family does not accept its configuration.
    """
    if process_groups.rank() != 0:
        return
    model, parallel, training = config.model, config.parallel, config.training
    tokenizer = build_tokenizer(config.tokenizer)
    families = make_families(config, tokenizer)
    for family in families:
        family.check(model, parallel)
    copies = parallel.data_parallel_size(planned_world_size(config))
    layout, cost, memory = plan_memory(config, tokenizer, families, copies)
    _print(layout, training, cost.parts, memory, Console(file=stream or sys.stdout))


def _print(
    layout: ParallelLayout,
    training: TrainingConfig,
    costs: dict[str, ModelCost],
    memory: list[StageMemory],
    console: Console,
) -> None:
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print("Dry run: no model is built and nothing is trained.", highlight=False)
    console.print(_describe(layout, training), highlight=False)
    if not training.has_constant_batch_size:
        console.print(_describe_ramp(layout, training), highlight=False)
    console.print(_parameter_table(costs))
    console.print(_memory_table(memory))
    console.print(_flops_table(layout, training, list(costs.values())))


def _describe(layout: ParallelLayout, training: TrainingConfig) -> str:
    parallel, model = layout.parallel, layout.model
    processes = layout.data_parallel_size * parallel.model_parallel_size
    sizes = f"data {layout.data_parallel_size} x tensor {parallel.tensor_model_parallel_size}"
    sizes += f" x pipeline {parallel.pipeline_model_parallel_size}"
    if layout.chunks > 1:
        sizes += f" ({layout.chunks} virtual stages each)"
    if parallel.context_parallel_size > 1:
        sizes += f" x context {parallel.context_parallel_size}"
    batch = _global_batch_size(layout)
    micro_batches = f"{layout.num_microbatches} micro-batch{'es' if layout.num_microbatches > 1 else ''}"
    return (
        f"{processes} processes = {sizes}; {training.precision}\n"
        f"one step = {batch} sequences of {model.seq_length} tokens; {micro_batches} of "
        f"{layout.micro_batch_size} per data-parallel rank"
    )


def _describe_ramp(layout: ParallelLayout, training: TrainingConfig) -> str:
    sizes = training.batch_sizes(_global_batch_size(layout))
    several = sizes.sizes()
    shown = f"{several[0]} to {several[-1]} sequences, in {len(several)} sizes"
    return (
        f"the first {sizes.steps_of_ramp()} steps have {shown}; memory and FLOPs below are for a step "
        "after these, except the FLOPs of the whole run"
    )


def _global_batch_size(layout: ParallelLayout) -> int:
    return layout.micro_batch_size * layout.num_microbatches * layout.data_parallel_size


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, safe_box=True)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _parameter_table(costs: dict[str, ModelCost]) -> Table:
    table = _table("Parameters", "part", "parameters", "", "share", "trained", "forward FLOPs per token")
    total = ModelCost(
        sum(cost.parameters for cost in costs.values()),
        sum(cost.forward_flops_per_token for cost in costs.values()),
        sum(cost.trained_parameters for cost in costs.values()),
    )
    for name, cost in {**costs, "total": total}.items():
        share = f"{100 * cost.parameters / total.parameters:.1f}%"
        shown = (
            f"{cost.parameters:,}",
            compact(cost.parameters),
            share,
            f"{cost.trained_parameters:,}",
            compact(cost.forward_flops_per_token),
        )
        table.add_row(name, *shown)
    return table


def _memory_table(stages: list[StageMemory]) -> Table:
    table = _table(
        "Memory per rank at the peak of a step (estimate; --rehearse counts every tensor)",
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "temporary",
        "total",
    )
    # Pipeline stages that need the same memory, as inner stages often do, share one row.
    for memory, group in groupby(enumerate(stages), key=lambda numbered: numbered[1]):
        numbers = [number for number, _ in group]
        name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        sizes = (
            memory.parameter_bytes,
            memory.gradient_bytes,
            memory.optimizer_bytes,
            memory.activation_bytes,
            memory.temporary_bytes,
        )
        table.add_row(name, compact(memory.parameters), *map(binary_size, (*sizes, memory.peak_bytes)))
    return table


def _flops_table(layout: ParallelLayout, training: TrainingConfig, costs: list[ModelCost]) -> Table:
    processes = layout.data_parallel_size * layout.parallel.model_parallel_size
    batch = _global_batch_size(layout)
    tokens = batch * layout.model.seq_length
    run = training.resolved_train_samples(batch) * layout.model.seq_length
    table = _table(
        "FLOPs (forward and backward; P = 10^15, E = 10^18, Z = 10^21, Y = 10^24)",
        "",
        "per token",
        "per step",
        "per step and process",
        "whole run",
    )
    for name, for_token in (
        ("model (basis of MFU)", training_flops_per_token(costs)),
        ("with recomputation", hardware_flops_per_token(layout.model, layout.parallel, costs)),
    ):
        step = for_token * tokens
        table.add_row(name, *map(compact, (for_token, step, step / processes, for_token * run)))
    return table
