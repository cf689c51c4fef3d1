"""Reads a launcher's settings from the environment: our variables first, then `torchrun`'s (PET_...), then Slurm's.

Slurm's variables are used only inside a job step (`srun`); in a batch script or an interactive allocation, the run is
on this host only.
"""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.platform.hosts.host_addresses import Endpoint

_SLURM_PORTS = 20000
"""First of the 10,000 ports from which a Slurm job chooses one by its id, as in slurm.sbatch."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """Settings of the launcher on one host of a run."""

    nodes: str
    """Number of hosts, or MIN:MAX."""

    processes: str
    """Processes on this host."""

    endpoint: Endpoint | None
    """Address at which the hosts meet; None if the run is on this host only."""

    run_id: str
    """Name of the run at the endpoint."""

    wait: int
    """Seconds to wait until the endpoint answers."""

    join_timeout: int
    """Seconds to wait until all hosts have joined."""

    hosts: tuple[str, ...] = ()
    """Names of all hosts, if Slurm provides them."""


def read_settings(environment: Mapping[str, str]) -> LaunchSettings:
    """Returns the settings in the environment variables.

    Raises:
        ValueError: a variable is malformed or missing, or contradicts another.
    """
    given = _Variables(environment)
    hosts = _slurm_hosts(environment)
    nodes = given.first("NNODES", "PET_NNODES") or str(max(1, len(hosts)))
    least, _, most = nodes.partition(":")
    if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least):
        raise ValueError(f"NNODES={nodes}: must be a number of hosts, or MIN:MAX with 1 <= MIN <= MAX")
    endpoint = None
    if int(most or least) > 1:
        endpoint = _endpoint(given, hosts)
        if endpoint is None:
            raise ValueError(f"NNODES={nodes}: requires RDZV_ENDPOINT=HOST:PORT, the same on every host")
    return LaunchSettings(
        nodes=nodes,
        processes=given.first("NPROC_PER_NODE", "PET_NPROC_PER_NODE") or str(max(1, _count_gpus())),
        endpoint=endpoint,
        run_id=given.first("RDZV_ID", "PET_RDZV_ID", *(["SLURM_JOB_ID"] if hosts else [])) or "per-layer",
        wait=given.seconds("RDZV_WAIT", 30),
        join_timeout=given.seconds("RDZV_JOIN_TIMEOUT", 600),
        hosts=hosts,
    )


class _Variables:
    """Environment variables; an empty one counts as not set."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def first(self, *names: str) -> str | None:
        """Returns the value of the first variable that is set."""
        return next((self._environment[name] for name in names if self._environment.get(name)), None)

    def seconds(self, name: str, default: int) -> int:
        """Returns the value of a variable that contains a number of seconds."""
        value = self.first(name) or str(default)
        if not value.isdecimal() or int(value) == 0:
            raise ValueError(f"{name}={value}: must be a number of seconds, at least 1")
        return int(value)


def _endpoint(given: _Variables, hosts: tuple[str, ...]) -> Endpoint | None:
    for name in ("RDZV_ENDPOINT", "PET_RDZV_ENDPOINT"):
        value = given.first(name)
        if value is not None:
            return Endpoint(name, value)
    address = given.first("PET_MASTER_ADDR")
    if address is not None:
        port = given.first("PET_MASTER_PORT")
        return Endpoint("PET_MASTER_ADDR", address if port is None else f"{address}:{port}")
    if hosts:
        port_number = _SLURM_PORTS + int(given.first("SLURM_JOB_ID") or 0) % 10000
        return Endpoint("SLURM_STEP_NODELIST's first host", f"{hosts[0]}:{port_number}")
    return None


def _slurm_hosts(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the names of the hosts in this Slurm step; empty outside a step, or if the step has one host."""
    count, names = environment.get("SLURM_STEP_NUM_NODES", "1"), environment.get("SLURM_STEP_NODELIST")
    if count == "1" or names is None:
        return ()
    tasks = environment.get("SLURM_STEP_NUM_TASKS", count)
    if tasks != count:
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS={tasks} on SLURM_STEP_NUM_NODES={count}: the launcher runs once on each host and "
            "starts its processes itself; use srun --ntasks-per-node=1"
        )
    command = ["scontrol", "show", "hostnames", names]
    return tuple(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def _count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.split("\n")) if listed.returncode == 0 else 0
