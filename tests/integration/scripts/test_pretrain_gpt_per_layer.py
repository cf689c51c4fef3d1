"""The entry point as a user starts it: under torchrun, killed, resumed, diverging, and with mistakes of every kind."""

import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.tiny_datasets import write_dataset
from megatron_ext.testing.torchrun import environment, torchrun
from megatron_ext.testing.warm_python.signalled_runs import Running, run_until
from megatron_ext.testing.warm_python.warm_server import warm_python

VOCABULARY = 64
MODEL = [
    *(
        "--num-layers",
        "2",
        "--hidden-size",
        "32",
        "--num-attention-heads",
        "4",
        "--seq-length",
        "16",
        "--swiglu",
    ),
    *("--use-per-layer-embedding", "--per-layer-preset", "gemma4", "--per-layer-hidden-size", "8"),
    # With loader processes, as many as a user's run has.
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-2", "--eval-iters", "0"),
    *("--log-interval", "1", "--device-peak-tflops", "1"),
]
TENSOR_PARALLEL = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An indexed dataset of random documents."""
    prefix = str(tmp_path_factory.mktemp("data") / "corpus")
    random = np.random.default_rng(1)
    write_dataset(prefix, [[random.integers(0, VOCABULARY, 40).tolist()] for _ in range(60)])
    return prefix


def command(*flags: str) -> list[str]:
    """Two ranks under torchrun."""
    return torchrun("pretrain_gpt_per_layer.py", *MODEL, *TENSOR_PARALLEL, *flags)


def run(*flags: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    layout = TENSOR_PARALLEL if processes > 1 else []
    return run_script("pretrain_gpt_per_layer.py", *MODEL, *layout, *flags, processes=processes)


def run_under_torchrun(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*flags), env=environment(), capture_output=True, text=True, timeout=240)


def losses(directory: Path, tag: str = "lm loss") -> dict[int, float]:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_run_stopped_by_sigterm_saves_and_goes_on_to_the_losses_of_the_run_that_never_stopped(
    data: str, tmp_path: Path
) -> None:
    flags = [
        "--data-path",
        data,
        "--train-iters",
        "12",
        "--hidden-dropout",
        "0.1",
        "--attention-dropout",
        "0.1",
    ]
    straight = run(*flags, "--tensorboard-dir", str(tmp_path / "straight"), processes=2)
    assert straight.returncode == 0, straight.stderr
    where = ["--save", str(tmp_path / "checkpoint"), "--tensorboard-dir", str(tmp_path / "stopped")]

    with subprocess.Popen(
        command(*flags, *where),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        workers = []
        for line in process.stdout:
            if line.startswith("step"):
                workers = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGTERM)
                break
        output = process.stdout.read()
    assert process.returncode != 0
    assert "received SIGTERM, exit code 143" in output and "DataLoader" not in output
    assert not psutil.wait_procs(workers, timeout=20)[1]
    stopped_at = max(losses(tmp_path / "stopped"))
    assert stopped_at < 12

    resumed = run(*flags, *where, "--load", str(tmp_path / "checkpoint"), processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert f"the run continues after step {stopped_at}" in resumed.stdout
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_a_killed_run_with_tables_by_rows_goes_on_to_the_losses_of_the_run_that_never_stopped(
    data: str, tmp_path: Path
) -> None:
    # Both runs save at the same steps: a save brings all rows up to date, which rounds.
    flags = ["--data-path", data, "--train-iters", "12", "--save-interval", "4", "--per-layer-sparse"]
    straight = run(
        *flags,
        *("--save", str(tmp_path / "whole"), "--tensorboard-dir", str(tmp_path / "straight")),
        processes=2,
    )
    assert straight.returncode == 0, straight.stderr
    checkpoint = str(tmp_path / "checkpoint")
    where = ["--save", checkpoint, "--tensorboard-dir", str(tmp_path / "stopped")]

    def kill(running: Running) -> None:
        for process in (*running.ranks, *running.loaders):
            process.kill()

    killed = run_until(command(*flags, *where), "saved step 4", kill)
    assert killed.code != 0 and not killed.still_running
    resumed = run(*flags, *where, "--load", checkpoint, processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search("the run continues after step [48]", resumed.stdout)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_a_context_parallel_run_under_torchrun_continues_in_a_single_process_and_back(
    data: str, tmp_path: Path
) -> None:
    flags = ["--data-path", data, "--train-iters", "6", "--num-workers", "2", "--split", "80,20,0"]
    flags += [
        "--eval-interval",
        "2",
        "--eval-iters",
        "1",
        "--hidden-dropout",
        "0",
        "--attention-dropout",
        "0",
    ]
    straight = run(*flags, "--tensorboard-dir", str(tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr
    checkpoint, parts = str(tmp_path / "checkpoint"), str(tmp_path / "parts")
    flags += ["--save", checkpoint, "--load", checkpoint, "--tensorboard-dir", parts, "--exit-interval", "2"]
    divided = [*MODEL, *flags, "--context-parallel-size", "2"]
    results = [
        subprocess.run(
            [warm_python(), *torchrun("pretrain_gpt_per_layer.py", *divided)[1:]],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=240,
        ),
        run(*flags),
        run_script("pretrain_gpt_per_layer.py", *divided, processes=2),
    ]
    for result, before in zip(results, (0, 2, 4), strict=True):
        assert result.returncode == 0, result.stderr
        assert not before or f"the run continues after step {before}" in result.stdout
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    evaluated = [losses(tmp_path / name, "lm loss validation") for name in ("parts", "straight")]
    assert evaluated[0].keys() == {2, 4, 6}
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


@pytest.mark.parametrize("more", [[], ["--bf16"], ["--bf16", "--use-distributed-optimizer"]])
def test_a_diverging_run_ends_with_its_own_exit_code_and_saves_nothing_broken(
    more: list[str], data: str, tmp_path: Path
) -> None:
    save = tmp_path / "checkpoint"
    flags = ["--data-path", data, "--train-iters", "50", "--save", str(save), "--save-interval", "1", *more]
    flags += ["--lr", "1e38", "--clip-grad", "0", "--max-consecutive-nan-steps", "3"]
    under_torchrun = "--use-distributed-optimizer" in more
    result = run_under_torchrun(*flags) if under_torchrun else run(*flags, processes=2 if more else 1)
    told = "not finite in 3 steps in a row"
    assert told in result.stdout
    if under_torchrun:
        assert result.returncode == 1 and "exitcode  : 3 " in result.stderr, result.stderr
        assert told in result.stderr.splitlines()[-2], "torchrun's report ends with it"
    else:
        assert result.returncode == 3, result.stderr
    good = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert max(map(int, re.findall(r"^step +(\d+)/", result.stdout, re.MULTILINE))) == good + 3


def test_samples_and_iterations_name_the_same_run(data: str, tmp_path: Path) -> None:
    for name, length in (("iterations", ["--train-iters", "3"]), ("samples", ["--train-samples", "12"])):
        result = run("--data-path", data, *length, "--tensorboard-dir", str(tmp_path / name))
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "iterations") == losses(tmp_path / "samples")
    assert len(losses(tmp_path / "samples")) == 3


MISTAKES = {
    "an unknown flag": (["--nmu-layers", "3"], "--nmu-layers"),
    "missing data": (["--data-path", "/nowhere/corpus"], "/nowhere/corpus.idx"),
    "heads that tensor parallel does not divide": (
        ["--num-attention-heads", "1", "--tensor-model-parallel-size", "2"],
        "--num-attention-heads 1: must be divisible by --tensor-model-parallel-size 2",
    ),
    "a directory that cannot be written": (["--save", "/proc/nowhere"], "--save /proc/nowhere"),
    "tables beyond the memory": (
        ["--per-layer-hidden-size", "1000000000"],
        "--per-layer-hidden-size 1000000000: a step needs about",
    ),
    "layers beyond the memory": (
        ["--hidden-size", "1000000"],
        "--num-layers 2, --hidden-size 1000000: a step needs about",
    ),
    "data of a larger vocabulary": (["--vocab-size", "32"], "but the tokenizer's vocabulary has only 33 ids"),
}


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The only error line that the run itself has printed; torchrun adds its own report of a failed process."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert 'pretrain_gpt_per_layer.py", line' not in result.stderr, result.stderr
    return lines[0]


@pytest.mark.parametrize("name", [name for name in MISTAKES if "heads" not in name])
def test_a_mistake_ends_the_run_with_one_line_and_exit_code_2(name: str, data: str) -> None:
    flags, told = MISTAKES[name]
    result = run("--data-path", data, "--train-iters", "2", *flags)
    assert result.returncode == 2
    assert told in one_line(result)


def test_a_truncated_dataset_is_refused_with_both_sizes(data: str, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    copy.with_suffix(".idx").write_bytes(Path(f"{data}.idx").read_bytes())
    copy.with_suffix(".bin").write_bytes(Path(f"{data}.bin").read_bytes()[:-100])
    result = run("--data-path", str(copy), "--train-iters", "2")
    assert result.returncode == 2
    assert "4700 bytes" in one_line(result) and "4800" in one_line(result)


def test_a_mistake_under_torchrun_is_told_once_and_leaves_no_process(data: str, tmp_path: Path) -> None:
    made = run("--data-path", data, "--train-iters", "1", "--save", str(tmp_path))
    assert made.returncode == 0, made.stderr
    heads_flags, heads_told = MISTAKES["heads that tensor parallel does not divide"]
    mistakes = [
        (heads_flags, heads_told),
        (["--load", str(tmp_path), "--hidden-size", "64"], "--hidden-size 64"),
    ]
    for flags, told in mistakes:
        started = time.monotonic()
        result = run_under_torchrun("--data-path", data, "--train-iters", "2", *flags)
        assert result.returncode != 0
        assert told in one_line(result)
        assert one_line(result) in result.stderr.splitlines()[-2], "torchrun's report ends with it"
        assert time.monotonic() - started < 120
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or [])]
