"""Signals to runs as users start them: under torchrun, with loader processes, in every one of the three scripts.

What torchrun, a terminal and a scheduler do is done here: a signal to the whole process group, to one process, or the
death of one. `data/test_loader_processes.py` has the same for the loader processes alone.
"""

import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.platform import process_groups
from megatron_ext.testing.checkpoint_runs import read_plain
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.torchrun import torchrun
from megatron_ext.testing.warm_python.signalled_runs import Ended, Running, run_until
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.run_lock import LOCK_FILE
from tests.integration.npt.npt_run_helpers import VOCABULARY, make_base, write_data

GPT, NPT, PROGRESSIVE = (f"pretrain_{name}.py" for name in ("gpt_per_layer", "npt", "progressive"))
SHARED = shlex.split(
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --split 60,20,20 --eval-interval 2 --eval-iters 4 "
    "--log-interval 1 --device-peak-tflops 1"
)
MODEL = shlex.split(
    "--hidden-size 32 --num-attention-heads 4 --seq-length 16 --swiglu --disable-bias-linear "
    f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY}"
)
FLAGS = {
    GPT: [
        *MODEL,
        *shlex.split("--num-layers 2 --hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 8"),
    ],
    NPT: shlex.split("--npt-layers upper_half --np-rank 4 --train-iters 8"),
    PROGRESSIVE: [
        *MODEL,
        *shlex.split(
            "--training-objective clm --n-blocks 2 --target-stacks 2 --stack-steps 6 --qlora-rank 4"
        ),
    ],
}
"""None says anything of loader processes, so that the runs have as many as a user's."""

MULTI_LAYER = ["--mode", "multi_layer"]
LAYER_PARALLEL = shlex.split(
    "--mode layer_parallel --teacher-cache-steps 2 --teacher-cache-passes 2 --teacher-cache-gb 1"
)

STOPPED_AT = {NPT: r"validation at step 2", PROGRESSIVE: r"step +8/"}
"""The line after which the signal is sent: after an evaluation, whose loader processes are others; before one, in the
second phase."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An indexed dataset."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model for NPT."""
    folder = tmp_path_factory.mktemp("base")
    made: str = run_single(make_base, str(folder), data)
    return made


def command(script: str, data: str, save: Path, *more: str, base: str = "", processes: int = 2) -> list[str]:
    """The command of a run that goes on from what its directory holds."""
    return torchrun(script, *_flags(script, data, save, *more, base=base), processes=processes)


def finish(script: str, data: str, save: Path, *more: str, base: str = "") -> str:
    """The output of the same run on two ranks, which nothing stops."""
    done = run_script(script, *_flags(script, data, save, *more, base=base), processes=2)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _flags(script: str, data: str, save: Path, *more: str, base: str) -> list[str]:
    flags = [*FLAGS[script], *SHARED, "--data-path", data, "--save", str(save), *more]
    if script == NPT:
        flags += ["--base-checkpoint", base]
    if script != PROGRESSIVE:
        flags += ["--load", str(save)]
    return flags


def to_group(number: signal.Signals, times: int = 1) -> Callable[[Running], None]:
    """Sends a signal to all processes of a run, its loader processes too."""

    def act(running: Running) -> None:
        assert len(running.loaders) >= 2 * len(running.ranks)
        for _ in range(times):
            running.send_to_group(number)

    return act


def ended(result: Ended) -> str:
    """The output of a run that is over at once and has left no process."""
    assert not result.still_running, result.output
    assert result.seconds < 60
    return result.output


def tensors_of(save: str, newest: str) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, with the optimizer's."""
    process_groups.initialize(ParallelConfig(), seed=1)
    folder = find_checkpoint(f"{save}/{newest}")
    assert folder is not None
    return read_plain(str(folder))


@pytest.mark.parametrize(
    ("script", "more"),
    [(NPT, MULTI_LAYER), (NPT, LAYER_PARALLEL), (PROGRESSIVE, [])],  # PLE: test_pretrain_gpt_per_layer.py
    ids=["multi_layer", "layer_parallel", "progressive"],
)
def test_a_run_that_sigterm_to_its_group_stops_saves_and_goes_on_to_the_tensors_of_the_run_that_never_stopped(
    script: str, more: list[str], data: str, base: str, tmp_path: Path
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    finish(script, data, straight, *more, base=base)
    result = run_until(
        command(script, data, stopped, *more, base=base), STOPPED_AT[script], to_group(signal.SIGTERM)
    )
    output = ended(result)
    found = re.search(r"stopped after step (\d+): received SIGTERM, exit code 143", output)
    assert result.code != 0 and found is not None, output
    assert f"saved step {found[1]} to" in output and "DataLoader" not in output
    assert f"continues after step {found[1]}" in finish(script, data, stopped, *more, base=base)
    newest = "progressive_rack" if script == PROGRESSIVE else ""
    expected, tensors = (run_single(tensors_of, str(save), newest) for save in (straight, stopped))
    assert expected.keys() == tensors.keys() and any(name.startswith("optimizer") for name in expected)
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, tensors[name])]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_process_without_launcher_saves_and_ends_with_the_code_of_a_signal_that_its_group_got_twice(
    number: signal.Signals, code: int, data: str, tmp_path: Path
) -> None:
    result = run_until(
        command(GPT, data, tmp_path, processes=0),
        r"step +3/",
        to_group(number, times=2),
        forked=number != signal.SIGTERM,  # one of them is a new interpreter, as a user's
    )
    output = ended(result)
    assert result.code == code, output
    assert f"received {number.name}, exit code {code}" in output and "saved step" in output
    assert "Traceback" not in output and "DataLoader" not in output


def test_a_signal_to_one_process_ends_all_after_a_save_and_torchruns_report_ends_with_why(
    data: str, tmp_path: Path
) -> None:
    result = run_until(
        command(GPT, data, tmp_path),
        r"step +3/",
        lambda running: running.ranks[1].send_signal(signal.SIGUSR1),
    )
    output = ended(result)
    assert result.code == 1 and "saved step" in output, output
    *_, reason, rule = output.strip().splitlines()
    assert set(rule) == {"="}
    assert re.fullmatch(r" +traceback : stopped after step \d+: received SIGUSR1, exit code 138", reason)
    assert output.count("Traceback") == 1, output  # torchrun's own


def test_a_killed_loader_process_ends_the_run_with_one_line_that_names_it(data: str, tmp_path: Path) -> None:
    killed: list[int] = []

    def act(running: Running) -> None:
        killed.append(running.loaders[0].pid)
        running.loaders[0].kill()

    result = run_until(command(GPT, data, tmp_path), r"step +3/", act)
    output = ended(result)
    assert result.code == 1, output
    # torch has two texts for it: which one comes depends on whether its signal handler or its queue sees it first.
    pid = killed[0]
    told = (
        rf"error: --num-workers: DataLoader worker \((pid {pid}\) is killed by signal: Killed"
        rf"|pid\(s\) {pid}\) exited unexpectedly)"
    )
    assert re.match(told, next(line for line in output.splitlines() if line.startswith("error: ")))
    assert re.search(told, output.splitlines()[-2])
    assert output.count("Traceback") == 1, output  # torchrun's own


def test_a_killed_process_ends_the_others_with_their_loader_processes_and_is_the_root_cause_in_the_report(
    data: str, tmp_path: Path
) -> None:
    result = run_until(
        command(GPT, data, tmp_path),
        r"step +3/",
        lambda running: running.ranks[1].kill(),
    )
    output = ended(result)
    assert result.code == 1, output
    assert "Signal 9 (SIGKILL) received by PID" in output.splitlines()[-2], output
    assert output.count("Traceback") == 1, output  # torchrun's own


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_processes_whose_launcher_a_signal_has_ended_save_and_leave(
    number: signal.Signals, data: str, tmp_path: Path
) -> None:
    # torchrun starts its processes in sessions of their own, and passes on neither of these.
    result = run_until(command(GPT, data, tmp_path), r"step +3/", to_group(number))
    output = ended(result)
    assert result.code == -number
    assert "saved step" in output and "received SIGTERM, exit code 143" in output


def test_an_interrupt_before_the_first_step_is_one_line_and_the_next_run_starts(
    data: str, tmp_path: Path
) -> None:
    # The lock appears when the processes have joined; model, optimizer and the data's index are made after that.
    interrupted = run_until(
        command(GPT, data, tmp_path),
        tmp_path / LOCK_FILE,
        lambda running: running.send_to_group(signal.SIGINT),
        forked=False,  # forks are so fast that the first step has begun by then
    )
    output = ended(interrupted)
    assert interrupted.code == 1 and output.count("error: interrupted") == 1, output
    assert "saved step" not in output and output.count("Traceback") == 1, "torchrun's own"
    assert "step 1/1" in finish(GPT, data, tmp_path, "--train-iters", "1")
