"""Loader processes alone: no signal of the group ends them, the end of their parent does, and their own end is told."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from megatron_ext.config.command_line.error_lines import ProcessLost
from megatron_ext.data.datasets.loader_processes import HELD_BACK, loader_failures
from megatron_ext.testing.torchrun import environment
from megatron_ext.training.stop_signals import EXIT_CODES
from tests.unit.data.test_samplers import assert_batches_in_order

PARENT = """
import os, signal, sys, threading, time
import torch
from megatron_ext.data.datasets.samplers import build_data_iterator

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, number):
        if number >= int(sys.argv[1]):
            time.sleep(600)
        return {"number": torch.tensor(number)}

def batches():
    return build_data_iterator(
        Samples(), consumed_samples=0, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1, num_workers=2
    )

received = 0
def count(*_):
    global received
    received += 1
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, count)
"""
"""A process that counts the signals it gets, and reads samples; those from a number on are never ready."""

FLOODED = (
    PARENT
    + """
flooding = True
def flood():
    while flooding:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.killpg(os.getpgid(0), number)
        time.sleep(0.0005)
thread = threading.Thread(target=flood)
thread.start()
for _ in range(10):
    numbers = batches()
    assert [int(next(numbers)["number"]) for _ in range(20)] == list(range(20))
    del numbers
flooding = False
thread.join()
print("received", received > 100, flush=True)
"""
)

BLOCKED = (
    PARENT
    + """
numbers = batches()
print("read", int(next(numbers)["number"]), flush=True)
sys.stdin.readline()
"""
)

LOST_IN_A_FORK = (
    PARENT
    + """
import psutil
from megatron_ext.data.datasets.loader_processes import ProcessLost, loader_failures

numbers = batches()
next(numbers)
victim = psutil.Process().children()[0].pid
alive = [victim]
def kill():
    while alive:
        os.kill(alive.pop(), signal.SIGKILL)
        os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
os.register_at_fork(before=kill)
try:
    with loader_failures():
        batches()
        while True:
            next(numbers)
except ProcessLost as error:
    print(str(error).replace(str(victim), "PID"), flush=True)
os._exit(0)
"""
)


@pytest.fixture
def blocked() -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A parent whose loader processes hang in their second samples, and these."""
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED, "2"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "read 0\n"
        loaders = psutil.Process(parent.pid).children()
        assert len(loaders) == 2
        yield parent, loaders
        for process in [parent, *loaders]:
            if psutil.pid_exists(process.pid):
                process.kill()


def test_signals_to_the_group_end_no_loader_process_from_its_very_first_moment_on() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FLOODED, "1000"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "received True\n" and result.stderr == ""


def test_the_death_of_a_loader_process_while_another_is_forked_is_the_same_one_line() -> None:
    command = [sys.executable, "-c", LOST_IN_A_FORK, "1000"]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith(
        "--num-workers: DataLoader worker (pid(s) PID) exited unexpectedly; lower"
    )
    assert result.returncode == 0 and result.stderr == ""


def test_hanging_loader_processes_do_not_keep_a_parent_that_ends(
    blocked: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    parent, loaders = blocked
    started = time.monotonic()
    _, errors = parent.communicate("\n", timeout=60)
    assert parent.returncode == 0 and errors == ""
    assert time.monotonic() - started < 30
    assert not psutil.wait_procs(loaders, timeout=5)[1]


def test_hanging_loader_processes_end_with_a_parent_that_is_killed(
    blocked: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    parent, loaders = blocked
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(loaders, timeout=5)[1]


@pytest.mark.parametrize(
    "told", ["(pid 7) is killed by signal: Killed. ", "(pid(s) 7, 8) exited unexpectedly"]
)
def test_the_death_of_a_loader_process_is_one_line_and_other_errors_pass(told: str) -> None:
    line = r"--num-workers: DataLoader worker \(pid.*; lower --num-workers if memory is short"
    with pytest.raises(ProcessLost, match=line), loader_failures():
        raise RuntimeError(f"DataLoader worker {told}")
    with pytest.raises(RuntimeError, match="another"), loader_failures():
        raise RuntimeError("another error")
    with pytest.raises(ConnectionResetError), loader_failures():
        raise ConnectionResetError


def test_loader_processes_are_forked_with_every_signal_blocked_that_a_run_handles() -> None:
    assert set(EXIT_CODES) <= set(HELD_BACK) and signal.SIGKILL not in HELD_BACK


def test_batches_of_loader_processes_come_in_order() -> None:
    assert_batches_in_order(num_workers=2)
