"""Runs a training script as a user does, under `torchrun`, and sends signals to it while it runs."""

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
    """The command; with no processes the script's own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes else []), str(ROOT / script), *flags]


@dataclass
class Running:
    """A run in a process group of its own, whose output has been read up to a line."""

    process: subprocess.Popen[str]
    lines: list[str]
    ranks: list[psutil.Process] = field(default_factory=list)
    """The training processes, those with the lowest rank first."""

    loaders: list[psutil.Process] = field(default_factory=list)
    """Their loader processes."""

    def send_to_group(self, number: signal.Signals) -> None:
        """As a terminal does: without a launcher to the training process with its loader processes, else to torchrun,

        which has put each of its processes into a group of its own, and passes the signal on to these groups.
        """
        os.killpg(self.process.pid, number)


@dataclass
class Ended:
    """What a run has left."""

    code: int
    output: str
    seconds: float
    """From the signal to the end."""

    parameters_with_state: list[psutil.Process]
    """Processes of the run that live ten seconds after it."""


def run_until(
    command: list[str], moment: str | Path, act: Callable[[Running], None], *, timeout: float = 240.0
) -> Ended:
    """Starts a command, acts at a moment, and waits for the end.

    Args:
        command: see `torchrun`.
        moment: a regular expression, which a line of the output matches at its start; or a file that appears.
        act: sends signals.
        timeout: seconds from the signal on, after which everything is killed.

    Raises:
        AssertionError: it ends before.
        TimeoutExpired: it goes on after the signal.
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
            parameters_with_state = psutil.wait_procs(everyone, timeout=10)[1]
        finally:
            for one in everyone:
                if one.is_running():
                    one.kill()
    return Ended(process.returncode, "".join(running.lines) + rest, seconds, parameters_with_state)


def _reaches(running: Running, moment: str | Path) -> bool:
    """Waits for the moment; False where the run ends before."""
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
    """This process's environment, without a place in another run."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    mine = {name: value for name, value in os.environ.items() if name not in names}
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
