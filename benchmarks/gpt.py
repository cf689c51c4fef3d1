#!/usr/bin/env python3
"""Compares the speed of our training step with Hugging Face's Llama of the same shape and the machine's GEMM rate.

    python benchmarks/gpt.py                      h=512, 4 layers, s=512, b=2, V=8192, fp32 and bf16, all cores

h: hidden size, s: tokens per sequence, b: sequences per step, V: vocabulary size, GEMM: a large matrix product.

Each variant of the model has its own process, which works while the others wait. Every round times each variant once,
in turn, so that changes in the machine's speed affect all of them. The table shows medians over the rounds; a ratio is
computed for each round, and the median of these is shown. Both sides run a whole training step: forward, backward,
gradient clipping, fused AdamW. Our step does more: it has a gradient buffer for data parallelism, checks for non-finite
gradients, and in bf16 keeps fp32 main weights (Hugging Face's updates bf16 weights).
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

    worker: str | None = None
    """Internal: run as the process of this variant, given as NAME/PRECISION."""


SHAPE = ("hidden_size", "num_layers", "seq_length", "micro_batch_size", "vocab_size")


@dataclass
class Variant:
    """A model, with functions to run forward+backward and a whole training step, which are timed."""

    forward_backward: Callable[[], None]
    step: Callable[[], None]


class Worker:
    """A process that holds one variant and times it on request."""

    def __init__(self, config: BenchmarkConfig, name: str, bf16: bool) -> None:
        shape = [f"--{field.replace('_', '-')}={getattr(config, field)}" for field in SHAPE]
        variant = f"--worker={name}/{'bf16' if bf16 else 'fp32'}"
        command = [sys.executable, __file__, *shape, variant]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, part: str) -> float:
        """Returns seconds for `fb` (forward+backward) or `step`, FLOP/s for `gemm`, bytes for `peak` or `steps`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(part, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def main() -> None:
    """Runs the benchmark and prints one table per precision."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/gpt.py",
        description="Compare the speed of our training step with Hugging Face's Llama.",
    )
    if config.worker is not None:
        _serve(config, *config.worker.split("/"))
        return
    for bf16 in (False, True):
        workers = {name: Worker(config, name, bf16) for name in VARIANTS}
        times: dict[str, list[float]] = {}
        for _ in range(config.rounds):
            times.setdefault("gemm", []).append(1.0 / workers["ours"].ask("gemm"))
            for name, worker in workers.items():
                for part in ("fb", "step"):
                    times.setdefault(f"{name} {part}", []).append(worker.ask(part))
        _print(config, bf16, times, {name: (w.ask("peak"), w.ask("steps")) for name, w in workers.items()})
        for worker in workers.values():
            worker.close()


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


def _print(
    config: BenchmarkConfig, bf16: bool, times: dict[str, list[float]], memory: dict[str, tuple[float, float]]
) -> None:
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    tokens = config.micro_batch_size * config.seq_length
    precision = "bf16" if bf16 else "fp32"
    device = torch.cuda.get_device_name() if use_cuda() else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        title=f"{precision}, {device}: h={config.hidden_size}, {config.num_layers} layers, s={config.seq_length}, "
        f"b={config.micro_batch_size}, V={config.vocab_size}; medians of {config.rounds} rounds"
    )
    for column in ("", "forward+backward", "tokens/s", "whole step", "tokens/s", "peak memory of a process"):
        table.add_column(column, justify="right" if column else "left")
    for name in VARIANTS:
        row = []
        for part in ("fb", "step"):
            seconds = statistics.median(times[f"{name} {part}"])
            row += [f"{1e3 * seconds:.1f} ms", f"{tokens / seconds:.0f}"]
        peak, by_steps = (value / 2**20 for value in memory[name])
        table.add_row(name, *row, f"{peak:.0f} MiB (+{by_steps:.0f} by steps)")
    console = Console(width=120)
    console.print(table)
    for line in _ratios(config, times):
        console.print(line, highlight=False)
    console.print()


def _ratios(config: BenchmarkConfig, times: dict[str, list[float]]) -> Iterator[str]:
    """Yields the results, one line each; a ratio is the median over the rounds of the ratio in one round."""

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    base, per_layer = _costs(config)
    parts = {"forward+backward": "fb", "whole step": "step"}
    peers = (f"{name} {ratio(f'hugging face {key}', f'ours {key}'):.3f}" for name, key in parts.items())
    yield f"ours / Hugging Face, tokens/s: {', '.join(peers)}"
    flops = 3 * base.forward_flops_per_token * config.micro_batch_size * config.seq_length
    used = (f"{flops * ratio('gemm', f'ours {key}'):.3f} in {name}" for name, key in parts.items())
    rate = 1.0 / statistics.median(times["gemm"])
    yield f"GEMM rate of the machine: {rate / 1e9:.0f} GFLOP/s; the part of it that ours uses: {', '.join(used)}"
    share = 100 * per_layer.forward_flops_per_token / base.forward_flops_per_token
    costs = (
        f"{name} {100 * (ratio(f'ours + PLE {key}', f'ours {key}') - 1):+.1f} %"
        for name, key in parts.items()
    )
    yield f"PLE (per-layer size h/8) adds {share:.1f} % to the FLOPs, and to the time: {', '.join(costs)}"


def _costs(config: BenchmarkConfig) -> "tuple[ModelCost, ModelCost]":
    from megatron_ext.models.costs.model_cost import model_cost

    model = _model(config)
    family = _per_layer(config)
    cost = family.cost(model)
    assert cost is not None
    return model_cost(model, config.vocab_size), cost


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


def _per_layer(config: BenchmarkConfig) -> "PerLayerFamily":
    from megatron_ext.per_layer.per_layer_config import PerLayerConfig
    from megatron_ext.per_layer.per_layer_family import PerLayerFamily

    per_layer = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_hidden_size=config.hidden_size // 8, per_layer_preset="gemma4"
    )
    return PerLayerFamily(per_layer, vocab_size=config.vocab_size)


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
        bf16=bf16,
        extensions=[f.extension() for f in families],
    )
    wrapped = wrap_model(chunks, parallel, bf16=bf16)
    settings = OptimizerSettings(lr=1e-4)
    optimizer = build_optimizer(settings, parallel, wrapped, families, bf16=bf16)
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


def _hugging_face(config: BenchmarkConfig, bf16: bool) -> Variant:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = _model(config)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=shape.resolved_ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=shape.num_attention_heads,
            max_position_embeddings=config.seq_length,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    device = _device()
    model = model.to(device, torch.bfloat16 if bf16 else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batches = _batches(config)

    def forward_backward() -> None:
        tokens = next(batches)["tokens"].to(device)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    def step() -> None:
        forward_backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Variant(forward_backward, step)


VARIANTS: dict[str, Callable[[BenchmarkConfig, bool], Variant]] = {
    "ours": lambda config, bf16: _ours(config, bf16, []),
    "hugging face": _hugging_face,
    "ours + PLE": lambda config, bf16: _ours(config, bf16, [_per_layer(config)]),
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
    a = torch.ones(size, size, dtype=torch.bfloat16 if bf16 else torch.float32, device=_device())
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
