"""Starts rehearsals: for each rehearsed rank, a process that runs the command again on the simulated device.

parent   `--rehearse` on the command line: chooses the ranks, sets the environment that `torchrun` would set
child    `python -m megatron_ext.rehearsal SCRIPT FLAGS`: loads the device, runs the same script, prints the report
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_ext.config.command_line.megatron_words import FLAGS_REPORTED
from megatron_ext.config.cross_checks import planned_processes
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.rehearsal_config import ALL_KINDS, RehearsalConfig
from megatron_ext.config.run_config import C
from megatron_ext.rehearsal.simulated import device_library
from megatron_ext.rehearsal.simulated.devices import GPUS_PER_HOST, device_named

_ROOT = Path(__file__).parents[2]

REHEARSED_DEVICE = "MEGATRON_EXT_REHEARSED_DEVICE"
"""Environment variable that tells a child process the name of the simulated device."""

MEMORY = "MEGATRON_EXT_REHEARSED_MEMORY_GB"
"""Environment variable that tells a child process the simulated device's memory in GiB; empty for the device's own."""


def run_or_rehearse(config: C, run: Callable[[C], int]) -> int:
    """Calls `run(config)`, or rehearses this call if --rehearse was given; returns the process's exit code.

    Raises:
        ValueError, OSError: a user error; the message is one line.
    """
    if not config.rehearsal.is_on:
        if config.rehearsal.world_size and not config.training.dry_run:
            raise ValueError(
                f"--world-size {config.rehearsal.world_size}: requires --rehearse or --dry-run; in a "
                "run that trains, "
                "torchrun sets the number of processes"
            )
        return run(config)
    if device_library.is_loaded():
        # Imported late: this imports torch, which must find the device.
        from megatron_ext.rehearsal.rehearsed_rank import rehearse_rank

        # As in a dry run, model families must require neither a base model nor a directory.
        return rehearse_rank(
            dataclasses.replace(config, training=dataclasses.replace(config.training, dry_run=True)), run
        )
    if config.training.skip_train:
        raise ValueError(
            "--skip-train: cannot be given with --rehearse, which runs training steps; omit one of the two flags"
        )
    flags = [*config.model.requires_te]
    if config.parallel.gradient_accumulation_fusion:
        flags.append("--gradient-accumulation-fusion")
    if flags:
        raise ValueError(
            f"{flags[0]}: --rehearse cannot run Transformer Engine's kernels; "
            "rehearse with --transformer-impl local, --attention-backend sdpa and --no-gradient-accumulation-fusion"
        )
    device_named(config.rehearsal.rehearsal_device, config.rehearsal.device_memory_gb)
    if int(os.environ.get("RANK") or 0) != 0:
        return 0  # under torchrun, only one process rehearses
    processes = planned_processes(config.rehearsal, config.parallel)
    ranks = ranks_to_rehearse(config.rehearsal, config.parallel, processes)
    device_library.library()  # compile now, so that a compiler error is the first line of output
    print(
        f"rehearsing rank {', '.join(map(str, ranks))} of {processes} on simulated GPUs: seconds to minutes, "
        "in proportion to layers x micro-batches",
        flush=True,
    )
    codes = [_start(rank, processes, config.rehearsal) for rank in ranks]
    return next((code for code in codes if code), 0)


def ranks_to_rehearse(rehearsal: RehearsalConfig, parallel: ParallelConfig, processes: int) -> list[int]:
    """Returns the requested rank; for `all-kinds`, the first rank of the first, of the second and of the last stage.

    Raises:
        ValueError: the run has no such rank, or the parallel layout does not fit the number of processes.
    """
    parallel.data_parallel_size(processes)
    if rehearsal.rehearse == ALL_KINDS:
        stages = parallel.pipeline_model_parallel_size
        # Among the inner stages, the second holds the most micro-batches. In megatron-core, the ranks of a stage are
        # consecutive.
        return [stage * (processes // stages) for stage in sorted({0, min(1, stages - 1), stages - 1})]
    rank = int(rehearsal.rehearse or 0)
    if rank >= processes:
        raise ValueError(
            f"--rehearse {rank}: must be less than the number of processes, {processes}: ranks are 0 "
            f"to {processes - 1}"
        )
    return [rank]


def _start(rank: int, processes: int, rehearsal: RehearsalConfig) -> int:
    """Rehearses one rank in a separate process; returns the exit code."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_RANK": 0,  # processes with this local rank print errors
        "LOCAL_WORLD_SIZE": min(processes, GPUS_PER_HOST),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
        "OMP_NUM_THREADS": 1,
        FLAGS_REPORTED: 1,
        REHEARSED_DEVICE: rehearsal.rehearsal_device,
        MEMORY: "" if rehearsal.device_memory_gb is None else rehearsal.device_memory_gb,
    }
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "PYTHONPATH": path}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    sys.stdout.flush()
    command = [sys.executable, "-m", "megatron_ext.rehearsal", *sys.argv]
    return subprocess.run(command, env=environment).returncode
