"""The lock on a directory of checkpoints: against a real process, which is killed, and on every rank of a run."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import TrainingConfig
from megatron_ext.platform import process_groups
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.training.checkpoint.run_lock import LOCK_FILE, release_lock, take_lock
from megatron_ext.training.pretrain import process_group

HOLD = f"""
import fcntl, os, sys, time
held = open(sys.argv[1] + "/{LOCK_FILE}", "w")
fcntl.lockf(held, fcntl.LOCK_EX)
print("process", os.getpid(), "on a host", end="", file=held, flush=True)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock on the test's directory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def _start(folder: str, *, skip_train: bool = False) -> str:
    """What a run says that starts and ends at once."""
    # The tests' processes join one process group only.
    process_groups.shutdown = lambda: None
    training = TrainingConfig(train_iters=1, skip_train=skip_train)
    try:
        with process_group(ParallelConfig(), training, CheckpointConfig(save=folder)):
            names = os.listdir(folder)
            dist.barrier()
            return f"runs {names}"
    except ValueError as error:
        return str(error)


def _refused_then_started(folder: str, holder: int) -> list[str]:
    said = [_start(folder), _start(folder, skip_train=True)]
    dist.barrier()
    if dist.get_rank() == 0:
        os.kill(holder, signal.SIGKILL)
        # Until its parent, the test, has seen to it, a killed process stays as a name without locks.
        while Path(f"/proc/{holder}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
    dist.barrier()
    return [*said, _start(folder), _start(folder)]


def test_a_second_run_is_refused_on_every_rank_until_the_first_is_killed(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    for found in run_distributed(_refused_then_started, 2, str(tmp_path), holder.pid):
        refused, evaluated, *started = found
        told = f"--save {tmp_path}: another run is writing to it (process {holder.pid} on a host); wait until that run"
        assert refused.startswith(told)
        assert evaluated == started[0] == started[1] == f"runs ['{LOCK_FILE}']"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_used_without(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.lockf", refuse)
    assert take_lock(tmp_path / "save") == []
    assert list((tmp_path / "save").iterdir()) == []


def test_a_file_that_a_killed_run_has_left_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("process 1 on elsewhere, a longer line than this run's own")
    (held,) = take_lock(tmp_path)
    assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert "longer" not in (tmp_path / LOCK_FILE).read_text()
    release_lock(held)


def _left_by_a_refused_run(folder: str) -> list[bool]:
    process_groups.shutdown = lambda: None
    left = []
    for writes in (False, True):
        try:
            with process_group(
                ParallelConfig(), TrainingConfig(train_iters=1), CheckpointConfig(save=folder)
            ):
                if writes:
                    (Path(folder) / "file").touch()
                raise ValueError("refused")
        except ValueError:
            left.append(os.path.exists(folder))
    return left


def test_a_refused_run_removes_the_directory_that_it_made_if_it_is_empty(tmp_path: Path) -> None:
    assert run_distributed(_left_by_a_refused_run, 1, str(tmp_path / "new")) == [[False, True]]
