#!/usr/bin/env python3
"""Measures the time and memory that `tools/convert_checkpoint.py` takes to import a sharded model and export it again.

    python benchmarks/conversion.py --gigabytes 5

The model is a Llama of that size in bf16, with random weights. Each command runs in a process of its own, whose largest
resident set is measured. Python and the libraries need what the same command needs for a tiny model; the rest of the
memory is for the model.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.parse import parse, run_main

_ROOT = Path(__file__).resolve().parents[1]
_SHARD = 500_000_000
_HIDDEN, _FFN, _HEADS, _GROUPS, _VOCABULARY = 2048, 5632, 16, 8, 32000
_BYTES_PER_LAYER = 2 * (_HIDDEN * (2 * _HIDDEN + 2 * _HIDDEN * _GROUPS // _HEADS) + 3 * _HIDDEN * _FFN)
_BYTES_OF_EMBEDDINGS = 2 * 2 * _VOCABULARY * _HIDDEN


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Flags for the size of the model."""

    gigabytes: float = 1.0
    """Size of the model's weights in GB; the benchmark needs three times as much disk space."""

    folder: str | None = None
    """Directory for the models, on the file system to measure; the files are removed at the end. Default: the system's
    directory for temporary files.
    """


@dataclass
class Measured:
    """Time and memory of one command."""

    seconds: float
    peak: float
    """Largest resident set, in bytes."""


def main() -> None:
    """Runs the benchmark and prints its table."""
    config: BenchmarkConfig = parse(
        BenchmarkConfig,
        prog="benchmarks/conversion.py",
        description="Measure time and memory of the import and the export of a Hugging Face model.",
    )
    layers = max(1, round((config.gigabytes * 1e9 - _BYTES_OF_EMBEDDINGS) / _BYTES_PER_LAYER))
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        _write(Path(folder, "tiny"), 1, is_tiny=True)
        tiny = _both_ways(Path(folder, "tiny"))
        _write(Path(folder, "model"), layers)
        size = sum(file.stat().st_size for file in Path(folder, "model").glob("*.safetensors"))
        measured = _both_ways(Path(folder, "model"))
    _print(size, tiny, measured)


def _both_ways(model: Path) -> dict[str, Measured]:
    checkpoint, exported = model.with_name(f"{model.name}-checkpoint"), model.with_name(f"{model.name}-out")
    return {
        "import": _run("import", "--model-dir", str(model), "--save", str(checkpoint)),
        "export": _run(
            "export", "--load", str(checkpoint), "--model-dir", str(exported), "--max-shard-size", f"{_SHARD}"
        ),
    }


def _run(*arguments: str) -> Measured:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, str(_ROOT / "tools" / "convert_checkpoint.py"), *arguments]
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return Measured(time.perf_counter() - started, usage.ru_maxrss * 1024)


def _write(folder: Path, layers: int, *, is_tiny: bool = False) -> None:
    """Writes a Llama with random weights, tensor by tensor."""
    import torch
    import transformers

    from megatron_ext.interop.formats.hf_files import write_safetensors

    hidden, ffn, heads, groups, vocabulary = (
        (64, 128, 4, 2, 256) if is_tiny else (_HIDDEN, _FFN, _HEADS, _GROUPS, _VOCABULARY)
    )
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)

    def random(name: str) -> "list[torch.Tensor]":
        return [torch.empty(shapes[name].shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)]

    groups_written = (
        ([(name, 2 * shape.numel())], functools.partial(random, name)) for name, shape in shapes.items()
    )
    write_safetensors(folder, groups_written, _SHARD)


def _print(size: int, tiny: dict[str, Measured], measured: dict[str, Measured]) -> None:
    table = Table(title=f"a Llama of {size / 1e9:.2f} GB in bf16")
    for column in ("", "seconds", "GB/s", "peak, MB", "of that for the model, MB", "share of the model"):
        table.add_column(column, justify="right")
    for name, found in measured.items():
        more = found.peak - tiny[name].peak
        # A process needs some seconds to start, as the one for the small model shows.
        seconds = found.seconds - tiny[name].seconds
        table.add_row(
            name,
            f"{found.seconds:.1f}",
            f"{size / 1e9 / seconds:.2f}",
            f"{found.peak / 1e6:.0f}",
            f"{more / 1e6:.0f}",
            f"{more / size:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    run_main(main)
