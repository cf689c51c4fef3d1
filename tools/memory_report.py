#!/usr/bin/env python3
"""Memory of NP components in a training step: one delta matrix a token, against the factored form. Measured.

    python tools/memory_report.py --np-rank 16 --np-target gate --output report.json

Measured at a few sizes: bytes a token that one converted layer takes beyond its base MLP, kept for the backward pass
and at the peak, see `megatron_ext/npt/evaluation/delta_memory.py`. From them the same at the shape of a 7B model,
and for a whole micro-batch over all converted layers. Document 002's 448 GB are one delta of [14336, 4096] in bf16 for
each of 4096 tokens.
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
    """What is measured, and the model that it is projected to."""

    sizes: str = "256,512,1024"
    """Hidden sizes to measure, at least two; f is in proportion to the projected model's."""

    bf16: bool = False
    """Weights and activations in bfloat16, else in fp32."""

    projected_hidden_size: int = 4096
    """h of the model that is projected to."""

    projected_ffn_hidden_size: int = 11008
    """f of that model: Llama 2 7B's; Llama 3 8B has 14336."""

    projected_num_layers: int = 32
    """Layers of that model; --npt-layers says which are converted."""

    tokens: int = 4096
    """Tokens of its micro-batch."""

    output: str | None = None
    """JSON file to write."""

    def __post_init__(self) -> None:
        names = ("projected_hidden_size", "projected_ffn_hidden_size", "projected_num_layers", "tokens")
        check_at_least(self, 1, *names)
        if len(set(self.hidden_sizes)) < 2:
            raise ValueError(f"--sizes {self.sizes}: must name two sizes at least")

    @property
    def hidden_sizes(self) -> list[int]:
        """The sizes as numbers.

        Raises:
            ValueError: they are none, or too small.
        """
        parts = self.sizes.split(",")
        if not all(part.strip().isdecimal() and int(part) >= 16 for part in parts):
            raise ValueError(f"--sizes {self.sizes}: must be whole numbers from 16, separated by commas")
        return [int(part) for part in parts]


@dataclass(frozen=True, kw_only=True)
class MemoryReportFlags:
    """All flags of this tool."""

    report: MemoryReportConfig
    npt: NPTModuleConfig


def main() -> None:
    """Measures, projects, prints, writes."""
    flags = parse(
        MemoryReportFlags,
        prog="tools/memory_report.py",
        description="Memory of NP components in training: materialised against factored.",
        example="python tools/memory_report.py --np-rank 16 --output report.json",
    )
    config, settings = flags.report, flags.npt
    layers = len(settings.layers(config.projected_num_layers))
    if config.output is not None and not Path(config.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {config.output}: its folder does not exist")
    # Imported late: torch and the engine take seconds, and `--help` or a mistyped flag should answer at once.
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
        title=f"{settings.np_form}, {settings.np_target}, r={settings.total_rank}, "
        f"{'bf16' if config.bf16 else 'fp32'}: bytes a token of one layer, beyond the base MLP"
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
