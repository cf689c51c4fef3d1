"""Runs a training script under `torchrun`, as a user does, and sends signals to it while it runs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def torchrun(script: str, *flags: str, processes: int = 2) -> list[str]:
    """Returns the command that runs a script under `torchrun`, or without a launcher if `processes` is 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes else []), str(ROOT / script), *flags]


@dataclass
class Running:
    """A running command in its own process group, with the output that it has printed so far."""

    process: subprocess.Popen[str]
    lines: list[str]
    ranks: list[psutil.Process] = field(default_factory=list)
    """The training processes, ordered by rank."""

    loaders: list[psutil.Process] = field(default_factory=list)
    """The data-loading processes of all ranks."""

    def send_to_group(self, number: signal.Signals) -> None:
        """Sends a signal to the process group, as a terminal does.

        Without `torchrun`, the group is the training process and its data-loading processes. With `torchrun`, it is
        `torchrun` alone, which starts each rank in a separate group and forwards the signal.
        """
        os.killpg(self.process.pid, number)


@dataclass
class Ended:
    """Results of a command that has ended."""

    code: int
    output: str
    seconds: float
    """Seconds from the signal to the end of the command."""

    still_running: list[psutil.Process]
    """Processes of the run that are still alive ten seconds after the command's end."""


def run_until(
    command: list[str], moment: str | Path, act: Callable[[Running], None], *, timeout: float = 240.0
) -> Ended:
    """Starts a command, calls `act` at a given moment, and waits for the end.

    Args:
        command: the command, from the function `torchrun`.
        moment: when to act: once the start of an output line matches this regular expression, or this file exists.
        act: function to call at that moment; it sends signals.
        timeout: seconds to wait for the end of the command after `act`; then all its processes are killed.

    Raises:
        AssertionError: the command ended before the moment.
        TimeoutExpired: the command did not end within `timeout`.
    """
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        running, everyone = Running(process, []), [psutil.Process(process.pid)]
        try:
            assert _reaches(running, moment), "".join(running.lines)
            everyone += everyone[0].children(recursive=True)
            first = everyone[0]
            running.ranks = first.children() if "torch.distributed.run" in first.cmdline() else [first]
            running.loaders = [child for rank in running.ranks for child in rank.children()]
            started = time.monotonic()
            act(running)
            rest, _ = process.communicate(timeout=timeout)
            seconds = time.monotonic() - started
            still_running = psutil.wait_procs(everyone, timeout=10)[1]
        finally:
            for one in everyone:
                if one.is_running():
                    one.kill()
    return Ended(process.returncode, "".join(running.lines) + rest, seconds, still_running)


def _reaches(running: Running, moment: str | Path) -> bool:
    """Waits for the moment; returns False if the command ends before it."""
    if isinstance(moment, Path):
        while not moment.exists():
            if running.process.poll() is not None:
                return False
            time.sleep(0.01)
        return True
    assert running.process.stdout is not None
    for line in running.process.stdout:
        running.lines.append(line)
        if re.match(moment, line):
            return True
    return False


def environment() -> dict[str, str]:
    """Returns this process's environment without the variables that would make a new command a rank of this run."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    mine = {name: value for name, value in os.environ.items() if name not in names}
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
