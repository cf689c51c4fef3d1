"""The example scripts run: the small one from nothing, the large one on two "hosts", the Slurm file and its requeue."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ext.testing.warm_python.warm_server import warm_variables

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
LARGE = str(EXAMPLES / "gpt_per_layer" / "train_gpt_per_layer_embedding.sh")
TINY = {
    "NUM_LAYERS": "2",
    "HIDDEN_SIZE": "32",
    "NUM_ATTENTION_HEADS": "2",
    "SEQ_LENGTH": "32",
    "PER_LAYER_VOCAB_SIZE": "200",
    "PER_LAYER_HIDDEN_SIZE": "16",
    "MICRO_BATCH_SIZE": "2",
    "GLOBAL_BATCH_SIZE": "4",
}
NO_PEAK = ["--device-peak-tflops", "1"]  # given, so that it is not measured


def environment(**changes: str) -> dict[str, str]:
    """The environment of a user's shell, with this interpreter as the scripts' Python."""
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**mine, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **changes}


def bash(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs an example; its Python commands and the ranks of its launchers start as forks."""
    return subprocess.run(
        ["bash", *arguments],
        env=environment(**{**warm_variables(), **changes}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the small example makes from nothing in two steps."""
    out = tmp_path_factory.mktemp("small")
    script = str(EXAMPLES / "gpt_per_layer" / "train_gpt_per_layer_small.sh")
    flags = ["--per-layer-stats-interval", "1", "--eval-iters", "1", "--num-workers", "0", *NO_PEAK]
    sizes = {**TINY, "VOCAB_SIZE": "512", "CORPUS_BYTES": "300000", "TRAIN_ITERS": "2"}
    result = bash(script, *flags, OUT=str(out), **sizes)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def seven_arguments(small_run: Path, results: Path) -> list[str]:
    """Checkpoints, logs, vocabulary, merges, data, per-layer vocabulary, per-layer data."""
    files = (
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "my_data",
        "per_layer_vocab.json",
        "my_data_per_layer",
    )
    return [str(results / "checkpoints"), str(results / "logs"), *(str(small_run / name) for name in files)]


def test_the_small_example_trains_and_leaves_data_checkpoint_and_curves(small_run: Path) -> None:
    tracker = small_run / "checkpoint" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "2"
    vocabulary = json.loads((small_run / "per_layer_vocab.json").read_text())
    assert list(vocabulary)[:4] == ["<|startoftext|>", "<|endoftext|>", "<|layer_start|>", "<|attention|>"]
    curves = EventAccumulator(str(small_run / "tensorboard")).Reload().Tags()["scalars"]
    assert {"lm loss", "lm loss validation", "per-layer/embedding-norm/layer_01"} <= set(curves)
    assert "per-layer/embedding-gradient-norm/layer_00" in curves


def test_the_large_example_takes_document_003s_seven_arguments_and_plans_175b(
    small_run: Path, tmp_path: Path
) -> None:
    result = bash(LARGE, *seven_arguments(small_run, tmp_path), "--dry-run", WORLD_SIZE="1024")
    assert result.returncode == 0, result.stderr
    assert "1024 processes = data 8 x tensor 8 x pipeline 16" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_large_example_tells_its_arguments_when_some_are_missing() -> None:
    result = bash(LARGE, "checkpoints", "logs")
    assert result.returncode == 2
    assert "CHECKPOINTS LOGS VOCAB MERGES DATA PER_LAYER_VOCAB PER_LAYER_DATA" in result.stderr


def test_two_hosts_meet_and_train_one_model(small_run: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    changes = {
        **TINY,
        "NNODES": "2",
        "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": endpoint,
        "TENSOR_MODEL_PARALLEL_SIZE": "2",
        "PIPELINE_MODEL_PARALLEL_SIZE": "1",
        "TRAIN_ITERS": "2",
        "EVAL_ITERS": "0",
        "SPLIT": "1",
    }
    command = ["bash", LARGE, *seven_arguments(small_run, tmp_path), "--num-workers", "0", *NO_PEAK]
    hosts = [
        subprocess.Popen(
            command, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    output = [host.communicate(timeout=300)[0].decode() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(output)
    assert "".join(output).count("step 2/2") == 1, "rank 0 alone reports"
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


SRUN = """#!/usr/bin/env bash
# Slurm's srun, as far as the batch file uses it: starts the tasks, passes USR1 on, ends with the highest code.
while [[ $1 == --* ]]; do shift; done
unset SLURM_CPUS_PER_TASK # not read since 22.05
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id "$@" & tasks+=($!); done
trap 'kill -s USR1 "${tasks[@]}"' USR1
highest=0
for task in "${tasks[@]}"; do
    while [ -e "/proc/$task" ]; do code=0; wait "$task" || code=$?; done
    if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$*" >> "$CALLS"; fi
"""
TASK = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SRUN_CPUS_PER_TASK")
line = " ".join(["task", *(os.environ[name] for name in names)])
os.write(1, line.encode() + b"\\n")  # at once: the two tasks share one pipe
if sys.argv[1] == "fail":
    sys.exit(3)
while True:
    signal.pause()
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, Any]:
    """An environment with stand-ins for Slurm's commands, two tasks on one host."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "task.py").write_text(TASK)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }
    path = f"{tmp_path}:{os.environ['PATH']}"
    return environment(PATH=path, CALLS=str(tmp_path / "calls"), **job)


@pytest.mark.parametrize(("mode", "code", "calls"), [("wait", 138, "requeue 7\n"), ("fail", 3, "")])
def test_the_slurm_job_is_requeued_after_a_save_on_usr1_and_not_after_an_error(
    tmp_path: Path, slurm: dict[str, Any], mode: str, code: int, calls: str
) -> None:
    batch = str(EXAMPLES / "multi_node" / "slurm.sbatch")
    command = ["bash", batch, str(tmp_path / "task.py"), mode]
    job = subprocess.Popen(command, env=slurm, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    lines = sorted(job.stdout.readline() for _ in range(2))
    assert lines == ["task 0 0 2 localhost 20007 8\n", "task 1 1 2 localhost 20007 8\n"]
    if mode == "wait":
        job.send_signal(10)
    assert job.wait(timeout=60) == code
    job.stdout.close()
    requeued = tmp_path / "calls"
    assert (requeued.read_text() if requeued.exists() else "") == calls
