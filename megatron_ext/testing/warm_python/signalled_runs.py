"""Runs a training script as a user does, and sends signals to it while it runs."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_ext.testing.torchrun import environment
from megatron_ext.testing.warm_python.forked_launcher import LAUNCHER, ForkedCommand


@dataclass
class Running:
    """A running command in its own process group, with the output that it has printed so far."""

    process: "subprocess.Popen[str] | ForkedCommand"
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
    command: list[str],
    moment: str | Path,
    act: Callable[[Running], None],
    *,
    timeout: float = 240.0,
    forked: bool = True,
) -> Ended:
    """Starts a command, calls `act` at a given moment, and waits for the end.

    Args:
        command: the command, from the function `torchrun`.
        moment: when to act: once the start of an output line matches this regular expression, or this file exists.
        act: function to call at that moment; it sends signals.
        timeout: seconds to wait for the end of the command after `act`; then all its processes are killed.
        forked: whether the command and its ranks are forks that have already imported torch and megatron-core,
            instead of new interpreters.

    Raises:
        AssertionError: the command ended before the moment.
        TimeoutExpired: the command did not end within `timeout`.
    """
    with ForkedCommand(command) if forked else _new_interpreter(command) as process:
        running, everyone = Running(process, []), [psutil.Process(process.pid)]
        try:
            assert _reaches(running, moment), "".join(running.lines)
            everyone += everyone[0].children(recursive=True)
            first = everyone[0]
            running.ranks = first.children() if LAUNCHER in command else [first]
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
    assert process.returncode is not None
    return Ended(process.returncode, "".join(running.lines) + rest, seconds, still_running)


def _new_interpreter(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


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
