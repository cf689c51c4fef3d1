"""Network namespaces as the hosts of a run: each has its own interfaces, addresses and host name.

    first host  eth0 10.77.1.1 (leads nowhere)   eth1 10.77.2.1 ──┐
    others                                       eth1 10.77.2.N ──┴── a bridge in a namespace of its own

Nothing outside these namespaces can be reached from them, and their host names do not resolve. Requires root and `ip`.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from megatron_ext.testing.torchrun import ROOT, environment

_PREFIX = "megatron-ext"
_serial = itertools.count()

INTERFACE = "eth1"
"""The interface that leads to the other hosts."""

_TRAINS = ("NNODES", "NPROC_PER_NODE", "RDZV_", "PET_", "SLURM_", "GLOO_", "NCCL_")
"""Starts of the names of variables that a launcher reads."""


@cache
def reason_without_hosts() -> str | None:
    """Returns why this machine cannot make such hosts; None if it can."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"requires the program {program}"
    try:
        with network(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces: {error.stderr.strip()}"


@dataclass
class Started:
    """A launcher on a host, with its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        """Returns what it has printed so far."""
        return self.log.read_text(encoding="utf-8")

    def wait(self, seconds: float) -> int:
        """Waits for its end and returns the exit code."""
        return self.process.wait(timeout=seconds)


@dataclass
class Host:
    """One host."""

    number: int
    namespace: str
    started: list[Started] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its host name."""
        return f"host{self.number}"

    @property
    def address(self) -> str:
        """Its address in the network of all hosts."""
        return f"10.77.2.{self.number}"

    def launch(self, log: Path, *command: str, **variables: str) -> Started:
        """Starts a command on the host, in the environment of a user who has set these variables."""
        own = {name: value for name, value in environment().items() if not name.startswith(_TRAINS)}
        on_host = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "bash", "-c"]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*on_host, 'hostname "$0"; exec "$@"', self.name, *command],
                env={**own, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        self.started.append(Started(process, log))
        return self.started[-1]

    def processes(self) -> list[psutil.Process]:
        """Returns the processes that run on the host, which are all the test's own."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Returns the training processes on the host by their ranks."""
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                variables, parent = process.environ(), process.parent()
                if "RANK" in variables and parent is not None and "RANK" not in parent.environ():
                    found[int(variables["RANK"])] = process
        return found

    def die(self) -> None:
        """Kills all processes of the host at once, as a power failure would."""
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(processes, timeout=5)
        for started in self.started:
            started.process.wait()

    def cut_off(self) -> None:
        """Takes the link to the other hosts down: they get no answer, and no message that there is none."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def delay(self) -> str:
        """Makes the link to the other hosts slow, and returns how."""
        link = ("dev", INTERFACE, "root")
        try:
            _tc(self.namespace, *link, "netem", "delay", "20ms")
        except subprocess.CalledProcessError:
            # A kernel without netem cannot delay packets, but it can limit their rate.
            _tc(self.namespace, *link, "tbf", "rate", "4mbit", "burst", "16kb", "latency", "400ms")
            return "4 Mbit/s (tbf; the kernel has no netem)"
        return "20 ms (netem)"


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Host]]:
    """Makes hosts, and removes them with all their processes when the block ends."""
    _remove_stale()
    name = f"{_PREFIX}-{os.getpid()}-{next(_serial)}"
    switch = f"{name}-switch"
    hosts = [Host(number, f"{name}-{number}") for number in range(1, count + 1)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "up", "type", "bridge")
        for host in hosts:
            _connect(host, switch)
        yield hosts
    finally:
        for host in hosts:
            if _exists(host.namespace):
                host.die()
                _ip("netns", "del", host.namespace)
        if _exists(switch):
            _ip("netns", "del", switch)


def _connect(host: Host, switch: str) -> None:
    own, port = host.namespace, f"port{host.number}"
    _ip("netns", "add", own)
    _ip("-n", own, "link", "set", "lo", "up")
    if host.number == 1:
        _ip("-n", own, "link", "add", "eth0", "up", "type", "bridge")
        _ip("-n", own, "address", "add", "10.77.1.1/24", "dev", "eth0")
    _ip("-n", own, "link", "add", INTERFACE, "type", "veth", "peer", "name", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, "up", "master", "bridge")
    _ip("-n", own, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    _ip("-n", own, "link", "set", INTERFACE, "up")


def _remove_stale() -> None:
    """Removes the hosts of processes that were killed."""
    for line in _ip("netns", "list").splitlines():
        namespace = line.split()[0]
        parts = namespace.removeprefix(f"{_PREFIX}-").split("-")
        if namespace.startswith(f"{_PREFIX}-") and not psutil.pid_exists(int(parts[0])):
            with contextlib.suppress(subprocess.CalledProcessError):
                Host(0, namespace).die()
                _ip("netns", "del", namespace)


def _exists(namespace: str) -> bool:
    return namespace in {line.split()[0] for line in _ip("netns", "list").splitlines()}


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _tc(namespace: str, *arguments: str) -> None:
    command = ["ip", "netns", "exec", namespace, "tc", "qdisc", "add", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
