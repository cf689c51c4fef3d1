#!/usr/bin/env python3
"""Measures the memory that NPT's components need in training: with one delta matrix per token, and in factored form.

    python tools/memory_report.py --np-rank 16 --np-target gate --output report.json

For a few hidden sizes, the tool measures how many bytes per token one converted layer needs in addition to its base
MLP: the bytes kept for the backward pass, and the peak (see `megatron_ext/npt/evaluation/delta_memory.py`). From these
it extrapolates to a 7B model, for a whole micro-batch and all converted layers. The 448 GB mentioned in
docs/design/npt_equivalence.md are the size of one bf16 delta matrix [14336, 4096] for each of 4096 tokens.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.field_checks import check_at_least
from megatron_ext.config.command_line.parse import parse, run_main
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig

if TYPE_CHECKING:
    from megatron_ext.npt.evaluation.delta_memory import SizeMemory, TokenBytes


@dataclass(frozen=True, kw_only=True)
class MemoryReportConfig:
    """Flags for the sizes to measure, and for the model to extrapolate to (the projected model)."""

    sizes: str = "256,512,1024"
    """Hidden sizes to measure, at least two, separated by commas. The ratio of FFN size to hidden size is the same as
    in the projected model.
    """

    bf16: bool = False
    """Use bfloat16 weights and activations instead of fp32."""

    projected_hidden_size: int = 4096
    """Hidden size of the model to which the measurements are extrapolated (the projected model)."""

    projected_ffn_hidden_size: int = 11008
    """FFN size of the projected model. The default is the size in Llama 2 7B; Llama 3 8B has 14336."""

    projected_num_layers: int = 32
    """Number of layers of the projected model; --npt-layers selects which of them are converted."""

    tokens: int = 4096
    """Tokens per micro-batch of the projected model."""

    output: str | None = None
    """JSON file to write the figures to."""

    def __post_init__(self) -> None:
        names = ("projected_hidden_size", "projected_ffn_hidden_size", "projected_num_layers", "tokens")
        check_at_least(self, 1, *names)
        if len(set(self.hidden_sizes)) < 2:
            raise ValueError(f"--sizes {self.sizes}: must have at least two different sizes")

    @property
    def hidden_sizes(self) -> list[int]:
        """Returns `sizes` as integers; raises `ValueError` unless all are whole numbers of at least 16."""
        parts = self.sizes.split(",")
        if not all(part.strip().isdecimal() and int(part) >= 16 for part in parts):
            raise ValueError(
                f"--sizes {self.sizes}: must be whole numbers of at least 16, separated by commas"
            )
        return [int(part) for part in parts]


@dataclass(frozen=True, kw_only=True)
class MemoryReportFlags:
    """Flags of this tool."""

    report: MemoryReportConfig
    npt: NPTModuleConfig


def main() -> None:
    """Measures the memory, extrapolates it to the projected model, and prints and writes the figures."""
    flags = parse(
        MemoryReportFlags,
        prog="tools/memory_report.py",
        description="Measure the memory of NP components in training: materialized against factored deltas.",
        example="python tools/memory_report.py --np-rank 16 --output report.json",
    )
    config, settings = flags.report, flags.npt
    layers = len(settings.layers(config.projected_num_layers))
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {config.output}: the directory of the file does not exist")
    # Imported late: torch and mcore take seconds to import; `--help` and errors in the flags should appear at once.
    from megatron_ext.npt.evaluation.delta_memory import measure_memory, project_memory
    from megatron_ext.platform.process_groups import initialize

    initialize(ParallelConfig(), seed=1)
    ratio = config.projected_ffn_hidden_size / config.projected_hidden_size
    measured = [
        measure_memory(settings, size, max(1, round(ratio * size)), config.bf16)
        for size in config.hidden_sizes
    ]
    shape = (config.projected_hidden_size, config.projected_ffn_hidden_size)
    projected = project_memory(measured, *shape)
    _print(config, settings, measured, projected, layers)
    if config.output is not None:
        report = {
            "settings": {"report": asdict(config), "npt": asdict(settings)},
            "measured": [asdict(size) for size in measured],
            "projected": asdict(projected),
            "micro_batch_bytes": {
                name: {str(count): of_form.of(config.tokens, count) for count in (1, layers)}
                for name, of_form in (
                    ("materialised", projected.materialised),
                    ("factored", projected.factored),
                )
            },
        }
        Path(config.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _print(
    config: MemoryReportConfig,
    settings: NPTModuleConfig,
    measured: "list[SizeMemory]",
    projected: "SizeMemory",
    layers: int,
) -> None:
    console = Console(width=120)
    table = Table(
        title=f"{settings.np_form}, {settings.np_target}, r={settings.np_rank}, k={settings.num_np_components}, "
        f"{'bf16' if config.bf16 else 'fp32'}: bytes per token of one layer, in addition to the base MLP"
    )
    table.add_column("h x f")
    for column in ("materialised: kept", "peak", "factored: kept", "peak", "kept, ratio"):
        table.add_column(column, justify="right")
    for size in (*measured, projected):
        name = f"{size.hidden_size} x {size.ffn_hidden_size}"
        row = [f"{value:,.0f}" for form in (size.materialised, size.factored) for value in _values(form)]
        ratio = size.materialised.kept / size.factored.kept
        table.add_row(name + (" projected" if size is projected else ""), *row, f"{ratio:,.0f}")
    console.print(table)
    for count in dict.fromkeys((1, layers)):
        for name, form in (("materialised", projected.materialised), ("factored", projected.factored)):
            console.print(
                f"{config.tokens} tokens, {count} converted layer(s) of h={projected.hidden_size}, "
                f"f={projected.ffn_hidden_size}, {name}: {_size(count * config.tokens * form.kept)} kept, "
                f"{_size(form.of(config.tokens, count))} at the peak",
                highlight=False,
            )


def _values(form: "TokenBytes") -> tuple[float, float]:
    return form.kept, form.peak


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


if __name__ == "__main__":
    run_main(main)
