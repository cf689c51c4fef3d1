#!/usr/bin/env python3
"""Rehearses what `make gpu` measures, and writes the figures to a JSON file; needs torch's CPU build.

python -m megatron_ext.rehearsal benchmarks/gpu/rehearsed.py --output build/gpu-wheels/rehearsed.json
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from check_runs import SCRIPTS, memory_flags

from megatron_ext.config.command_line.parse import parse, run_main


@dataclass(frozen=True, kw_only=True)
class RehearsedConfig:
    """Flags for the file to write and the figures in it."""

    output: str
    """File to write."""

    sizes: tuple[str, ...] = ("full", "tiny")
    """Sizes of the models, as for benchmarks/gpu/check.py."""


def main() -> None:
    """Rehearses the kernels in this process and the training runs in other processes; writes the figures."""
    config: RehearsedConfig = parse(
        RehearsedConfig,
        prog="benchmarks/gpu/rehearsed.py",
        description="Write the figures that benchmarks/gpu/check.py compares a GPU with.",
    )
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megatron_ext.rehearsal.rehearsed_rank import simulate
    from megatron_ext.rehearsal.simulated.devices import device_named

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    recorder = simulate(device_named("H200", None))
    from kernels import measure_kernels  # after the simulation has started, because it imports the engine

    found: dict[str, Any] = {}
    for size in config.sizes:
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            kernels = measure_kernels(size, profiled=False)
        runs = {family: _run(script, memory_flags(family, size)) for family, script in SCRIPTS.items()}
        found[size] = {"torch": torch.__version__, "kernels": kernels, "runs": runs}
    Path(config.output).write_text(json.dumps(found, indent=1), encoding="utf-8")


def _run(script: str, flags: list[str]) -> dict[str, Any]:
    from megatron_ext.testing.rehearsing.rehearsals import rehearse

    rehearsed = rehearse(script, *flags, processes=1)
    if rehearsed.error is not None:
        raise ValueError(f"{script}: {rehearsed.error}")
    waits = rehearsed.waits()
    return {"peak": rehearsed.peak.size, "waits": sum(waits.values()), "places": waits}


if __name__ == "__main__":
    run_main(main)
