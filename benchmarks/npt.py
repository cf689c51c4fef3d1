#!/usr/bin/env python3
"""Measures the cost of NP components in one layer, forward and backward: time compared with FLOPs, and memory.

    python benchmarks/npt.py                      h=1024, f=4096, s=512, b=2, fp32, all cores

NP components are what NPT adds to a layer: a low-rank update of the MLP's weights for every token. h: hidden size,
f: FFN size, s: tokens per sequence, b: sequences per step. The columns of the tables are:

    share        FLOPs that NP components add / FLOPs of the base layer, forward and backward
    wall time    time of the NPT layer / time of the base layer - 1, as the median of the ratios within a round
    over         (wall time - share) in percentage points

In the mode `trained`, both layers train all their weights; here `over` should be at most 3 points. In the mode
`frozen`, the base weights of both layers are frozen. The last column of this mode compares the NPT layer with a base
layer that trains all its weights, because converting a layer replaces such training. Every round times each layer once,
in turn. CPU time includes the time that threads wait; on a busy machine, CPU time with `--threads 1` is the better
measure.

Peak memory is that of a training step with AdamW: weights, gradients, optimizer state and activations.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.field_checks import check_at_least
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig

if TYPE_CHECKING:
    import torch

SETTINGS = NPTModuleConfig(npt_layers="all", np_residual="keep")
CASES = {
    f"{form}, {target}, r={rank}": replace(SETTINGS, np_form=form, np_target=target, np_rank=rank)
    for form in ("low_rank", "outer_product")
    for target in ("gate", "gate+up+down")
    for rank in (64, 256)
}
MODES = ("trained", "frozen")
WARM_UP = 2
PROJECTED = (4096, 14336, 4096, 16)
"""Hidden size, FFN size, number of tokens and of converted layers for the memory figure in
docs/design/npt_equivalence.md."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the shape of the layer and the length of the measurement."""

    hidden_size: int = 1024
    """Hidden size (h)."""

    ffn_hidden_size: int = 4096
    """FFN size (f)."""

    seq_length: int = 512
    """Tokens per sequence (s)."""

    micro_batch_size: int = 2
    """Sequences per step (b)."""

    rounds: int = 5
    """Number of timed rounds; each times every layer once."""

    threads: int = 0
    """Number of CPU threads; 0 uses torch's default."""

    materialised_tokens: int = 8
    """Number of tokens with which the materialized form (one delta matrix per token) is timed."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "seq_length", "micro_batch_size", "rounds", "materialised_tokens")
        check_at_least(self, 0, "threads")


class Layer:
    """One layer to measure: an NPT layer, or the base layer if `settings` is None."""

    def __init__(self, config: BenchmarkConfig, settings: NPTModuleConfig | None) -> None:
        import torch

        from megatron_ext.models.build_model import build_model
        from megatron_ext.npt.modules.npt_extension import NPTExtension

        extensions: list[Any] = [] if settings is None else [NPTExtension(settings)]
        chunk = build_model(_model(config), ParallelConfig(), vocab_size=64, seed=1, extensions=extensions)[0]
        self.layer: Any = chunk.decoder.layers[0]
        self.rotary = chunk.rotary_pos_emb(config.seq_length)
        shape = (config.seq_length, config.micro_batch_size, config.hidden_size)
        generator = torch.Generator().manual_seed(1)
        self.inputs, self.gradient = (
            torch.randn(shape, generator=generator).to(next(self.layer.parameters())) for _ in range(2)
        )

    def train(self, mode: str) -> None:
        """Makes all weights trainable (mode `trained`), or freezes the base weights (mode `frozen`)."""
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(mode == "trained" or name.startswith("feed_forward."))

    def forward_backward(self) -> None:
        """Runs one forward and backward pass."""
        # The input needs a gradient, as it does in the middle of a model.
        inputs = self.inputs.detach().requires_grad_()
        output, _ = self.layer(inputs, attention_mask=None, rotary_pos_emb=self.rotary)
        output.backward(self.gradient)

    def seconds(self) -> tuple[float, float]:
        """Returns the wall time and CPU time of one pass."""
        self.layer.zero_grad(set_to_none=True)
        _wait()
        begin = time.perf_counter(), time.process_time()
        self.forward_backward()
        _wait()
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    def peak_bytes(self, mode: str) -> int:
        """Returns the peak bytes of a training step: weights, gradients, optimizer state and activations."""
        import torch

        from megatron_ext.platform.allocations import AllocationCounter

        self.train(mode)
        trained = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        held = sum(p.numel() * p.element_size() for p in self.layer.parameters())
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
        peak = 0
        for _ in range(2):
            self.layer.zero_grad(set_to_none=True)
            with AllocationCounter() as counter:
                self.forward_backward()
                peak = counter.peak
                if optimizer is not None:
                    optimizer.step()
        return held + 2 * sum(p.numel() * p.element_size() for p in trained) + peak


def main() -> None:
    """Runs the benchmark and prints its tables."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/npt.py",
        description="Cost of NP components in one layer, forward and backward.",
        example="python benchmarks/npt.py --threads 1",
    )
    import torch

    from megatron_ext.platform.process_groups import initialize

    if config.threads:
        torch.set_num_threads(config.threads)
    initialize(ParallelConfig(), seed=1)
    layers = {"base": Layer(config, None)} | {name: Layer(config, case) for name, case in CASES.items()}
    times = {mode: _times(config, layers, mode) for mode in MODES}
    _print(config, layers, times)
    _print_materialised(config, layers)
    _print_projected()


def _times(
    config: BenchmarkConfig, layers: dict[str, Layer], mode: str
) -> dict[str, list[tuple[float, float]]]:
    for layer in layers.values():
        layer.train(mode)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for number in range(WARM_UP + config.rounds):
        for name, layer in layers.items():
            seconds = layer.seconds()
            if number >= WARM_UP:
                found[name].append(seconds)
    return found


def _print(
    config: BenchmarkConfig,
    layers: dict[str, Layer],
    times: dict[str, dict[str, list[tuple[float, float]]]],
) -> None:
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    device = torch.cuda.get_device_name() if use_cuda() else f"CPU, {torch.get_num_threads()} thread(s)"
    console = Console(width=130)
    for mode in MODES:
        table = Table(
            title=f"base weights {mode}: NPT layer over base layer, forward+backward, fp32, {device}: "
            f"h={config.hidden_size}, f={config.ffn_hidden_size}, s={config.seq_length}, "
            f"b={config.micro_batch_size}; {config.rounds} rounds"
        )
        table.add_column("", no_wrap=True)
        for column in ("FLOP share", "wall time", "over", "CPU time", "over", "peak of a step"):
            table.add_column(column, justify="right")
        if mode == "frozen":
            table.add_column("wall time vs trained base", justify="right")
        for name, layer in layers.items():
            first = ["", *_base_times(times[mode]["base"])]
            row = first if name == "base" else _overheads(config, mode, times[mode], name)
            row.append(f"{layer.peak_bytes(mode) / 2**20:.0f} MiB")
            if mode == "frozen":
                ratio = _ratio(times["frozen"][name], times["trained"]["base"], 0)
                row.append(f"{100 * (ratio - 1):+.1f} %")
            table.add_row(name, *row)
        console.print(table)


def _base_times(times: list[tuple[float, float]]) -> list[str]:
    wall, processor = (f"{1e3 * statistics.median(column):.0f} ms" for column in zip(*times, strict=True))
    return [wall, "", processor, ""]


def _overheads(
    config: BenchmarkConfig, mode: str, times: dict[str, list[tuple[float, float]]], name: str
) -> list[str]:
    share = _share(config, CASES[name], mode)
    row = [f"{100 * share:.1f} %"]
    for clock in (0, 1):
        measured = _ratio(times[name], times["base"], clock) - 1
        row += [f"{100 * measured:.1f} %", f"{100 * (measured - share):+.1f}"]
    return row


def _ratio(times: list[tuple[float, float]], base: list[tuple[float, float]], clock: int) -> float:
    return statistics.median(a[clock] / b[clock] for a, b in zip(times, base, strict=True))


def _share(config: BenchmarkConfig, settings: NPTModuleConfig, mode: str) -> float:
    """Returns FLOPs that NP components add / FLOPs of the base layer, forward and backward."""
    from megatron_ext.models.costs.model_cost import core_attention_flops_per_token, layer_flops_per_token
    from megatron_ext.npt.npt_cost import npt_cost

    model = _model(config)
    base = layer_flops_per_token(model)
    passes = 3 * base  # each product has two more in the backward pass
    if mode == "frozen":
        # With a frozen weight the backward pass has one product, for the input's gradient. Core attention has no
        # weight and keeps all three.
        passes = 2 * base + core_attention_flops_per_token(model)
    return 3 * npt_cost(settings, model).forward_flops_per_token / passes


def _print_materialised(config: BenchmarkConfig, layers: dict[str, Layer]) -> None:
    """Prints the time of the form that materializes every token's delta, and of the factored form."""
    from megatron_ext.npt.modules.materialised_deltas import materialised_mlp

    console = Console(width=130)
    tokens = config.seq_length * config.micro_batch_size
    for name in ("low_rank, gate, r=64", "outer_product, gate, r=64"):
        layer = layers[name].layer
        factored = _mlp_seconds(config, tokens, lambda *x, of=layer: of.feed_forward.mlp_output(of, *x))
        built = _mlp_seconds(
            config,
            config.materialised_tokens,
            lambda *x, of=layer: materialised_mlp(of.feed_forward, of, *x),
        )
        console.print(
            f"{name}, MLP alone, base frozen: {1e3 * factored:.2f} ms per token factored, {1e3 * built:.1f} ms "
            f"materialized ({config.materialised_tokens} tokens)",
            highlight=False,
        )


def _print_projected() -> None:
    """Prints the memory of both forms at the shape `PROJECTED`, from measurements of smaller shapes."""
    from megatron_ext.npt.evaluation.delta_memory import measure_memory, project_memory

    console = Console(width=130)
    hidden, ffn, batch, converted = PROJECTED
    settings = replace(SETTINGS, np_rank=16)
    for bf16 in (False, True):
        measured = [measure_memory(settings, size, size * ffn // hidden, bf16) for size in (256, 512, 1024)]
        found = project_memory(measured, hidden, ffn)
        sizes = [
            f"{count} converted layer(s) {found.materialised.of(batch, count) / 2**30:,.0f} GiB materialized "
            f"({batch * count * found.materialised.kept / 2**30:,.0f} kept for the backward pass), "
            f"{found.factored.of(batch, count) / 2**20:.1f} MiB factored"
            for count in (1, converted)
        ]
        precision = "bf16" if bf16 else "fp32"
        console.print(
            f"{batch} tokens, h={hidden}, f={ffn}, gate, r=16, {precision}, beyond the base MLP, from measured bytes "
            f"per token: {'; '.join(sizes)}",
            highlight=False,
        )


def _mlp_seconds(config: BenchmarkConfig, tokens: int, run: "Callable[..., torch.Tensor]") -> float:
    """Returns the seconds per token for forward and backward."""
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    device = torch.cuda.current_device() if use_cuda() else "cpu"
    shape = (tokens, 1, config.hidden_size)
    inputs = [torch.randn(shape, device=device).requires_grad_() for _ in range(2)]
    gradient = torch.randn(shape, device=device)
    seconds = []
    for _ in range(4):
        _wait()
        begin = time.perf_counter()
        run(*inputs).backward(gradient)
        _wait()
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / tokens


def _model(config: BenchmarkConfig) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=max(1, config.hidden_size // 64),
        seq_length=config.seq_length,
        position_embedding_type="rope",
        swiglu=True,
        disable_bias_linear=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _wait() -> None:
    import torch

    from megatron_ext.platform.process_groups import use_cuda

    if use_cuda():
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(main)
