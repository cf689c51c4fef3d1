#!/usr/bin/env python3
"""Compares the speed of our training step with Hugging Face's Llama of the same shape and the machine's GEMM rate.

    python benchmarks/gpt.py                      h=512, 4 layers, s=512, b=2, V=8192, fp32 and bf16, all cores
    python benchmarks/gpt.py --variants ours mcore --precisions bf16    next to megatron-core's own GPTModel

h: hidden size, s: tokens per sequence, b: sequences per step, V: vocabulary size, GEMM: a large matrix product.

Each variant of the model has its own process, which works while the others wait. Every round times each variant once,
in turn, so that changes in the machine's speed affect all of them. The table shows medians over the rounds; a ratio is
computed for each round, and the median of these is shown. Every variant runs a whole training step: forward, backward,
gradient clipping, fused AdamW. Our step does more than Hugging Face's: it has a gradient buffer for data parallelism,
checks for non-finite gradients, and in bf16 keeps fp32 main weights (Hugging Face's updates bf16 weights). `mcore` is
megatron-core's own GPTModel without Transformer Engine, with our data parallelism and optimizer.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig

if TYPE_CHECKING:
    import torch

    from megatron_ext.models.costs.model_cost import ModelCost
    from megatron_ext.npt.npt_family import NPTFamily
    from megatron_ext.per_layer.per_layer_family import PerLayerFamily
    from megatron_ext.training.interface.family_interface import Batch, Family


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the shape of the model and the length of the measurement."""

    hidden_size: int = 512
    """Hidden size (h)."""

    num_layers: int = 4
    """Number of layers."""

    seq_length: int = 512
    """Tokens per sequence (s)."""

    micro_batch_size: int = 2
    """Sequences per step (b)."""

    vocab_size: int = 8192
    """Vocabulary size (V)."""

    rounds: int = 15
    """Number of timed rounds; each times every variant once."""

    variants: tuple[str, ...] = ("ours", "hugging face", "ours + PLE")
    """Models to time: ours, hugging face, mcore, ours + PLE, ours + PLE by rows, ours + NPT. `ours` is required."""

    precisions: tuple[str, ...] = ("fp32", "bf16")
    """Precisions to time them in."""

    output: str | None = None
    """File to write all measured values to, as JSON."""

    worker: str | None = None
    """Internal: run as the process of this variant, given as NAME/PRECISION."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or "ours" not in self.variants:
            raise ValueError(
                f"--variants {' '.join(self.variants)}: must contain ours, and only names from this list: "
                f"{', '.join(VARIANTS)}"
            )


SHAPE = ("hidden_size", "num_layers", "seq_length", "micro_batch_size", "vocab_size")


@dataclass
class Variant:
    """A model, with functions to run forward+backward and a whole training step, which are timed."""

    forward_backward: Callable[[], None]
    step: Callable[[], None]


class WorkerEnded(Exception):
    """A variant's process has ended; the message is the last line that it printed."""


class Worker:
    """A process that holds one variant and times it on request."""

    def __init__(self, config: BenchmarkConfig, name: str, precision: str) -> None:
        shape = [f"--{field.replace('_', '-')}={getattr(config, field)}" for field in SHAPE]
        command = [sys.executable, __file__, *shape, f"--worker={name}/{precision}"]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # `close` closes it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def ask(self, part: str) -> float:
        """Returns the measured value of a part.

        Args:
            part: `fb` (seconds of forward+backward), `step` (seconds of a step), `gemm` (FLOP/s), `peak` (largest
                memory of the process in bytes) or `steps` (how many of these bytes the steps need).

        Raises:
            WorkerEnded: the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(part, file=self._process.stdin, flush=True)
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self._process.wait()
            self._errors.seek(0)
            lines = [line.strip() for line in self._errors if line.strip()]
            raise WorkerEnded(lines[-1] if lines else "it printed nothing") from None

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._errors.close()


@dataclass
class Measured:
    """The measured values of one precision."""

    times: dict[str, list[float]]
    """Seconds of each round by variant and part, such as `ours step`; `gemm`: seconds per FLOP of a large product."""

    memory: dict[str, tuple[float, float]]
    """Peak bytes of each variant's process, and how many of these bytes the steps need."""

    failed: dict[str, str]
    """Reason of the failure, for each variant that failed."""


def main() -> int:
    """Runs the benchmark and prints one table per precision; returns the exit code."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/gpt.py",
        description="Compare the speed of our training step with Hugging Face's Llama.",
    )
    if config.worker is not None:
        _serve(config, *config.worker.split("/"))
        return 0
    found = {precision: _measure(config, precision) for precision in config.precisions}
    for precision, measured in found.items():
        _print(config, precision, measured)
    if config.output is not None:
        Path(config.output).write_text(json.dumps(_values(config, found)), encoding="utf-8")
    return int(any(measured.failed for measured in found.values()))


def _measure(config: BenchmarkConfig, precision: str) -> Measured:
    workers = {name: Worker(config, name, precision) for name in config.variants}
    found = Measured({}, {}, {})
    questions = {"gemm": "ours"} | {f"{name} {part}": name for name in workers for part in ("fb", "step")}
    for _ in range(config.rounds):
        for question, name in questions.items():
            if name in found.failed:
                continue
            try:
                value = workers[name].ask(question.split()[-1])
                found.times.setdefault(question, []).append(1.0 / value if question == "gemm" else value)
            except WorkerEnded as error:
                found.failed[name] = str(error)
    for name, worker in workers.items():
        if name not in found.failed:
            found.memory[name] = worker.ask("peak"), worker.ask("steps")
        worker.close()
    return found


def _values(config: BenchmarkConfig, found: dict[str, Measured]) -> dict[str, Any]:
    """Returns the measured values and the FLOPs of a step, for the JSON file."""
    base, added = _costs(config)
    tokens = config.micro_batch_size * config.seq_length
    return {
        "tokens": tokens,
        "flops": 3 * base.forward_flops_per_token * tokens,
        "parameters": base.parameters,
        "flop_shares": {
            name: cost.forward_flops_per_token / base.forward_flops_per_token for name, cost in added.items()
        },
        "precisions": {precision: vars(measured) for precision, measured in found.items()},
    }


def _serve(config: BenchmarkConfig, name: str, precision: str) -> None:
    """Runs in the worker process: answers the requests of `Worker.ask`."""
    from megatron_ext.platform.device_memory import memory_use

    bf16 = precision == "bf16"
    variant = VARIANTS[name](config, bf16)
    before = memory_use().current
    for _ in range(3):
        variant.step()
    answers: dict[str, Callable[[], float]] = {
        "fb": lambda: _timed(variant.forward_backward),
        "step": lambda: _timed(variant.step),
        "gemm": lambda: _gemm_rate(bf16),
        "peak": lambda: float(memory_use().peak),
        "steps": lambda: float(memory_use().peak - before),
    }
    for line in sys.stdin:
        print(answers[line.strip()](), flush=True)


def _print(config: BenchmarkConfig, precision: str, measured: Measured) -> None:
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    tokens = config.micro_batch_size * config.seq_length
    device = torch.cuda.get_device_name() if use_cuda() else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        title=f"{precision}, {device}: h={config.hidden_size}, {config.num_layers} layers, s={config.seq_length}, "
        f"b={config.micro_batch_size}, V={config.vocab_size}; medians of {config.rounds} rounds"
    )
    for column in ("", "forward+backward", "tokens/s", "whole step", "tokens/s", "peak memory of a process"):
        table.add_column(column, justify="right" if column else "left")
    for name, memory in measured.memory.items():
        row = []
        for part in ("fb", "step"):
            seconds = statistics.median(measured.times[f"{name} {part}"])
            row += [f"{1e3 * seconds:.1f} ms", f"{tokens / seconds:.0f}"]
        peak, by_steps = (value / 2**20 for value in memory)
        table.add_row(name, *row, f"{peak:.0f} MiB (+{by_steps:.0f} by steps)")
    console = Console(width=120)
    console.print(table)
    for line in _ratios(config, measured):
        console.print(line, highlight=False)
    for name, reason in measured.failed.items():
        console.print(f"{name} failed: {reason}", highlight=False, markup=False)
    console.print()


def _ratios(config: BenchmarkConfig, measured: Measured) -> Iterator[str]:
    """Yields the results, one line each; a ratio is the median over the rounds of the ratio in one round."""
    if "ours" in measured.failed:
        return

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(measured.times[a], measured.times[b], strict=True))

    base, added = _costs(config)
    parts = {"forward+backward": "fb", "whole step": "step"}
    for peer, shown in (("hugging face", "Hugging Face"), ("mcore", "mcore")):
        if peer in measured.memory:
            peers = (f"{name} {ratio(f'{peer} {key}', f'ours {key}'):.3f}" for name, key in parts.items())
            yield f"ours / {shown}, tokens/s: {', '.join(peers)}"
    flops = 3 * base.forward_flops_per_token * config.micro_batch_size * config.seq_length
    used = (f"{flops * ratio('gemm', f'ours {key}'):.3f} in {name}" for name, key in parts.items())
    rate = 1.0 / statistics.median(measured.times["gemm"])
    yield f"GEMM rate of the machine: {rate / 1e9:.0f} GFLOP/s; the part of it that ours uses: {', '.join(used)}"
    for name, detail in (
        ("ours + PLE", "PLE (per-layer size h/8)"),
        ("ours + PLE by rows", "PLE (the same, --per-layer-sparse)"),
        ("ours + NPT", "NPT (rank h/32, all layers)"),
    ):
        if name in measured.memory:
            share = 100 * added[name].forward_flops_per_token / base.forward_flops_per_token
            costs = (
                f"{part} {100 * (ratio(f'{name} {key}', f'ours {key}') - 1):+.1f} %"
                for part, key in parts.items()
            )
            yield f"{detail} adds {share:.1f} % to the FLOPs, and to the time: {', '.join(costs)}"


def _costs(config: BenchmarkConfig) -> "tuple[ModelCost, dict[str, ModelCost]]":
    """Returns the cost of the base model, and what each family adds to it."""
    from megatron_ext.models.costs.model_cost import model_cost

    model = _model(config)
    families: dict[str, Any] = {
        "ours + PLE": _per_layer(config),
        "ours + PLE by rows": _per_layer(config, by_rows=True),
        "ours + NPT": _npt(config),
    }
    added = {name: family.cost(model) for name, family in families.items()}
    return model_cost(model, config.vocab_size), added


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


def _per_layer(config: BenchmarkConfig, *, by_rows: bool = False) -> "PerLayerFamily":
    from megatron_ext.per_layer.per_layer_config import PerLayerConfig
    from megatron_ext.per_layer.per_layer_family import PerLayerFamily

    per_layer = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_hidden_size=config.hidden_size // 8,
        per_layer_preset="gemma4",
        per_layer_sparse=by_rows,
    )
    return PerLayerFamily(per_layer, vocab_size=config.vocab_size)


def _npt(config: BenchmarkConfig) -> "NPTFamily":
    from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
    from megatron_ext.npt.npt_family import NPTFamily

    rank = max(1, config.hidden_size // 32)
    settings = NPTModuleConfig(npt_layers="all", np_residual="keep", np_rank=rank, freeze_base=False)
    return NPTFamily(settings)


def _ours(config: BenchmarkConfig, bf16: bool, families: "list[Family]") -> Variant:
    from megatron_ext.models.build_model import build_model
    from megatron_ext.platform.process_groups import initialize
    from megatron_ext.training.engine.data_parallel import wrap_model
    from megatron_ext.training.engine.lr_schedule import build_scheduler
    from megatron_ext.training.engine.optimizer import build_optimizer
    from megatron_ext.training.engine.training_step import Stepper

    initialize(ParallelConfig(), seed=1)
    parallel, model = ParallelConfig(), _model(config)
    chunks = build_model(
        model,
        parallel,
        vocab_size=config.vocab_size,
        seed=1,
        precision="bf16" if bf16 else "fp32",
        extensions=[f.extension() for f in families],
    )
    for family in families:
        family.prepare_model(chunks)
    wrapped = wrap_model(chunks, parallel, precision="bf16" if bf16 else "fp32")
    settings = OptimizerSettings(lr=1e-4)
    optimizer = build_optimizer(settings, parallel, wrapped, families, precision="bf16" if bf16 else "fp32")
    scheduler = build_scheduler(
        settings, TrainingConfig(train_iters=10**6), optimizer, config.micro_batch_size
    )
    stepper = Stepper(
        wrapped,
        families,
        optimizer,
        scheduler,
        global_batch_size=config.micro_batch_size,
        micro_batch_size=config.micro_batch_size,
        clip_grad=1.0,
    )
    batches = _batches(config)
    return Variant(
        forward_backward=lambda: _discard(stepper.forward_backward(batches)),
        step=lambda: _discard(stepper.train(batches, 1)),
    )


def _peer(name: str) -> Callable[[BenchmarkConfig, bool], Variant]:
    def build(config: BenchmarkConfig, bf16: bool) -> Variant:
        from peers import gpt_peers

        passes = getattr(gpt_peers, name)(
            _model(config), config.vocab_size, bf16, _device(), _batches(config)
        )
        return Variant(*passes)

    return build


VARIANTS: dict[str, Callable[[BenchmarkConfig, bool], Variant]] = {
    "ours": lambda config, bf16: _ours(config, bf16, []),
    "hugging face": _peer("hugging_face"),
    "mcore": _peer("mcore"),
    "ours + PLE": lambda config, bf16: _ours(config, bf16, [_per_layer(config)]),
    "ours + PLE by rows": lambda config, bf16: _ours(config, bf16, [_per_layer(config, by_rows=True)]),
    "ours + NPT": lambda config, bf16: _ours(config, bf16, [_npt(config)]),
}


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


def _gemm_rate(bf16: bool, size: int = 2048) -> float:
    """Returns the FLOP/s of a large square matrix product, an upper bound for the machine."""
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    size = 8192 if use_cuda() else size
    # Random values: a GPU multiplies constants faster, because it needs less power for them.
    a = torch.randn(size, size, dtype=torch.bfloat16 if bf16 else torch.float32, device=_device())
    return 2.0 * size**3 / min(_timed(lambda: _discard(a @ a)) for _ in range(3))


def _device() -> "torch.device":
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    return torch.device("cuda" if use_cuda() else "cpu")


def _timed(run: Callable[[], None]) -> float:
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    if use_cuda():
        torch.cuda.synchronize()


def _discard(_: Any) -> None:
    """Drops the result of a call, because only the call's time is measured."""


if __name__ == "__main__":
    run_main(main)
