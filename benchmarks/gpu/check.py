#!/usr/bin/env python3
"""Runs the checks that need a GPU, within eight minutes, and prints one table; docs/gpu.md explains its rows.

    make gpu PYTHON=python3                                      on the machine with the GPU
    python benchmarks/gpu/check.py --device cpu --size tiny      the same code on a CPU, in a minute or two

A row that fails shows the reason in one line. The other rows are measured all the same, and the exit code is 1.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from check_runs import make_data
from jobs import FAILED, Job, Machine, Row, all_jobs, run_job
from rich.console import Console
from rich.table import Table

from megatron_ext.config.command_line.field_checks import check_positive
from megatron_ext.config.command_line.parse import parse, run_main


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Flags of the check."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Device to check; on cpu, rows that need CUDA are skipped."""

    size: Literal["full", "tiny"] = "full"
    """Size of the models: full for a GPU of 141 GB, tiny for a CPU."""

    rehearsed: str | None = None
    """JSON file written by benchmarks/gpu/rehearsed.py; the figures of the device are compared with those in it."""

    output: str | None = None
    """File to write the rows to, as JSON."""

    only: tuple[str, ...] = ()
    """Run only the jobs that have a row whose name contains one of these words."""

    minutes: float = 8.0
    """Time limit for all jobs together, in minutes; jobs that have not finished by then are ended and fail."""

    jobs: int = 4
    """Number of jobs at a time; jobs that measure times run alone on a GPU."""

    def __post_init__(self) -> None:
        check_positive(self, "minutes", "jobs")


def main() -> int:
    """Runs the jobs and prints the table; returns the exit code."""
    config: CheckConfig = parse(
        CheckConfig,
        prog="benchmarks/gpu/check.py",
        description="Run the checks that need a GPU, and print one table.",
    )
    end = time.monotonic() + 60 * config.minutes
    with tempfile.TemporaryDirectory() as folder:
        machine = _machine(config, Path(folder))
        words = config.only or ("",)
        jobs = [job for job in all_jobs(machine) if any(word in row for word in words for row in job.rows)]
        rows = _run(jobs, machine, end, config.jobs)
    title = _title(machine)
    _print(title, rows)
    if config.output is not None:
        content = {"title": title, "rows": [dataclasses.asdict(row) for row in rows]}
        Path(config.output).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return int(any(row.verdict == FAILED for row in rows))


def _machine(config: CheckConfig, folder: Path) -> Machine:
    import torch

    from megatron_ext.platform.peak_rate import known_tflops

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no CUDA device on this machine")
    known = known_tflops(torch.cuda.get_device_name(), "bf16") if config.device == "cuda" else None
    text = "{}" if config.rehearsed is None else Path(config.rehearsed).read_text(encoding="utf-8")
    return Machine(
        device=config.device,
        gpus=torch.cuda.device_count() if config.device == "cuda" else 0,
        size=config.size,
        folder=folder,
        data=make_data(folder),
        rehearsed=json.loads(text).get(config.size, {}),
        datasheet=None if known is None else known * 1e12,
    )


def _run(jobs: Sequence[Job], machine: Machine, end: float, at_a_time: int) -> list[Row]:
    """Runs the jobs, first those that may run side by side; returns their rows in the order of the jobs."""

    def rows_of(job: Job) -> list[Row]:
        rows = run_job(job, machine, end)
        for row in rows:
            print(f"{row.name}: {row.verdict}", flush=True)
        return rows

    together = [job for job in jobs if machine.is_cpu or not job.alone]
    with ThreadPoolExecutor(at_a_time) as pool:
        found = dict(zip(map(id, together), pool.map(rows_of, together), strict=True))
    found |= {id(job): rows_of(job) for job in jobs if id(job) not in found}
    return [row for job in jobs for row in found[id(job)]]


def _title(machine: Machine) -> str:
    import torch

    name = "CPU" if machine.is_cpu else f"{machine.gpus} x {torch.cuda.get_device_name()}"
    rehearsed = f", rehearsed with torch {machine.rehearsed['torch']}" if machine.rehearsed else ""
    return f"{name}, {machine.size}, torch {torch.__version__}, CUDA {torch.version.cuda}{rehearsed}"


def _print(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=title)
    for column in ("row", "", "result", "goal"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(text.replace("[", "\\[") for text in (row.name, row.verdict, row.result, row.goal)))
    Console(width=150).print(table)


if __name__ == "__main__":
    run_main(main)
