"""Saves beside training in runs as users start them: killed, stopped, with a full disk, in all three scripts."""

import re
import signal
import subprocess
from pathlib import Path

import pytest

from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.torchrun import environment
from megatron_ext.testing.warm_python.signalled_runs import Running, run_until
from megatron_ext.testing.warm_python.warm_server import warm_python
from megatron_ext.training.checkpoint import checkpoint_files as files
from tests.integration.npt.kill_and_resume import differences
from tests.integration.npt.npt_run_helpers import make_base, write_data
from tests.integration.scripts import test_stop_signals_of_scripts as runs
from tests.integration.scripts.kill_async_saves import ASYNC, MORE, Prepared, kill

HIDDEN = f"{files.WRITING}iter_0000003"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An indexed dataset."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("script", list(MORE))
def test_a_run_killed_while_it_saves_beside_training_ends_with_the_tensors_of_one_that_saved_in_its_place(
    script: str, data: str, tmp_path: Path
) -> None:
    base = run_single(make_base, str(tmp_path / "base"), data) if script == runs.NPT else ""
    prepared = Prepared(script, data, base)
    prepared.finish(tmp_path / "whole")
    kill(prepared, tmp_path / "killed", step=3, seconds=0.05)
    output = prepared.finish(tmp_path / "killed", *ASYNC)
    assert "continues after step" in output and "training waited" in output
    assert not list((tmp_path / "killed").rglob(f"{files.WRITING}*"))
    whole, killed = (prepared.tensors(tmp_path / name) for name in ("whole", "killed"))
    assert not differences(whole, killed) and any(name.startswith("optimizer") for name in whole)


def test_a_run_stopped_by_sigterm_during_a_save_completes_it_and_saves_the_last_step(
    data: str, tmp_path: Path
) -> None:
    prepared = Prepared(runs.GPT, data)
    result = run_until(prepared.command(tmp_path), tmp_path / HIDDEN, runs.to_group(signal.SIGTERM))
    output = runs.ended(result)
    stopped = re.search(r"stopped after step (\d+): received SIGTERM, exit code 143", output)
    assert result.code == 1 and stopped is not None, output
    assert all(f"saved step {step} to" in output for step in range(1, int(stopped[1]) + 1))
    assert sorted(files.complete_checkpoints(tmp_path)) == list(range(1, int(stopped[1]) + 1))
    assert not list(tmp_path.glob(f"{files.WRITING}*"))


def test_a_rank_killed_during_a_save_ends_the_others_and_the_last_complete_checkpoint_is_there(
    data: str, tmp_path: Path
) -> None:
    def act(running: Running) -> None:
        running.ranks[1].kill()

    result = run_until(Prepared(runs.GPT, data).command(tmp_path), tmp_path / HIDDEN, act)
    output = runs.ended(result)
    assert result.code == 1 and "Signal 9 (SIGKILL) received by PID" in output.splitlines()[-2], output
    assert files.find_checkpoint(str(tmp_path)) is not None


@pytest.mark.parametrize("small_disk", ["40m"], indirect=True)
def test_a_disk_that_fills_up_beside_training_is_one_line_and_leaves_the_earlier_checkpoints(
    data: str, small_disk: Path
) -> None:
    done = subprocess.run(
        [warm_python(), *Prepared(runs.GPT, data).command(small_disk)[1:]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    error = (
        rf"error: --save {small_disk}: the checkpoint of step (\d+) could not be written \(.*No space left on device"
        r".*\); its files were removed; earlier checkpoints are intact"
    )
    found = re.findall(error, done.stderr)
    assert done.returncode == 1 and found, done.stderr
    assert done.stderr.count("Traceback") == 1, "torchrun's own"
    failed = int(found[0])
    assert failed > 1 and sorted(files.complete_checkpoints(small_disk)) == list(range(1, failed))
    assert not list(small_disk.glob(f"{files.WRITING}*"))
