"""Flags of the runs of `make gpu` at both sizes; runs a command within a time limit, and reads its figures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ext.platform.parent_process import signal_at_parents_end

ROOT = Path(__file__).parents[2]

SCRIPTS = {
    "PLE": "pretrain_gpt_per_layer.py",
    "NPT": "pretrain_npt.py",
    "progressive": "pretrain_progressive.py",
}
STEPS = 4
"""Steps of a training run; the progressive model trains each of its two stacks for half of them."""

CLUSTER = "--bf16 --use-distributed-optimizer --recompute-granularity full --recompute-method uniform " + (
    "--recompute-num-layers 1"
)
"""Flags that a run on a cluster would set, and that a run in one process can test."""

_VOCABULARY = 256
# The model that trains, on the CPU too; the model whose memory is measured; the shape of benchmarks/gpt.py.
_SMALL = {
    "full": "--hidden-size 256 --num-attention-heads 8 --num-query-groups 4 --seq-length 256",
    "tiny": "--hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --seq-length 64",
}
_LARGE = {
    "full": "--hidden-size 2048 --num-attention-heads 32 --num-query-groups 8 --seq-length 2048 --bf16",
    # Without groups: in fp32 a GPU has no fused kernel for grouped queries, but the CPU has.
    "tiny": "--hidden-size 128 --num-attention-heads 8 --seq-length 128",
}
SPEED = {
    "full": "--hidden-size 2048 --num-layers 16 --seq-length 4096 --micro-batch-size 4 --vocab-size 32000 --rounds 10",
    "tiny": "--hidden-size 64 --num-layers 1 --seq-length 64 --micro-batch-size 2 --vocab-size 256 --rounds 2",
}
_COMMON = (
    "--swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --normalization RMSNorm "
    "--position-embedding-type rope --tokenizer-type NullTokenizer --lr 1e-3"
)
_TRAINING = (
    "--micro-batch-size 2 --global-batch-size 4 --num-workers 0 --eval-iters 0 --log-interval 1 "
    "--device-peak-tflops 1 --split 100,0,0"
)
_FAMILIES = {
    "base": "--num-layers 4",
    "PLE": "--num-layers 4 --use-per-layer-embedding --per-layer-hidden-size 16 --per-layer-preset gemma4",
    "NPT": "--num-layers 4 --mode multi_layer --npt-layers upper_half --np-rank 8 --npt-log-interval 1",
    "progressive": "--n-blocks 2 --target-stacks 2 --training-objective clm --trunk-strategy qlora --qlora-rank 4",
}

# What a machine's environment may set and what would change the figures: TF32 in fp32 products, a synchronous device,
# another allocator, the place of a rank.
_REMOVED = (
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


def training_flags(family: str, size: str, data: str) -> list[str]:
    """Returns the flags of a small training run of `STEPS` steps; the family `base` trains one step."""
    steps = {"base": "--train-iters 1", "progressive": f"--stack-steps {STEPS // 2}"}
    model = f"{_SMALL[size]} {_COMMON} --vocab-size {_VOCABULARY} {_FAMILIES[family]}"
    return f"{model} {steps.get(family, f'--train-iters {STEPS}')} {_TRAINING} --data-path {data}".split()


def memory_flags(family: str, size: str) -> list[str]:
    """Returns the flags of the run whose memory and waits are both rehearsed and measured."""
    steps = "--stack-steps 100" if family == "progressive" else "--train-iters 100"
    vocabulary = 32000 if size == "full" else 1000
    batch = "--micro-batch-size 4 --global-batch-size 8 --no-log-throughput"
    return f"{_LARGE[size]} {_COMMON} --vocab-size {vocabulary} {_FAMILIES[family]} {steps} {batch}".split()


def make_data(folder: Path) -> str:
    """Writes an indexed dataset of random tokens; returns its prefix."""
    import numpy as np

    from megatron_ext.testing.tiny_datasets import write_dataset

    random = np.random.default_rng(1)
    write_dataset(str(folder / "data"), [[random.integers(0, _VOCABULARY, 2000).tolist()] for _ in range(20)])
    return str(folder / "data")


class CommandFailed(Exception):
    """A command has failed or ran too long; the message is one line."""


def run(command: Sequence[str], *, until: float, on_cpu: bool, fp32: bool = False) -> str:
    """Runs a command and returns its output.

    Args:
        command: arguments of the Python interpreter.
        until: the time of `time.monotonic` at which all its processes are ended.
        on_cpu: hide the GPUs from it.
        fp32: compute fp32 products in fp32 on a GPU, whatever the machine's libraries prefer.

    Raises:
        CommandFailed: its exit code is not 0, or it did not end in time.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _REMOVED}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment |= ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}) | (
        {"NVIDIA_TF32_OVERRIDE": "0"} if fp32 else {}
    )
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal_at_parents_end, signal.SIGTERM),
    )
    name = next((Path(word).name for word in command if word.endswith(".py")), command[0])
    try:
        output, _ = process.communicate(timeout=max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"{name} was ended at its time limit") from None
    finally:
        _end(process)
    if process.returncode:
        raise CommandFailed(f"{name}: exit code {process.returncode}: {_reason(output)}")
    return output


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends what is left of the command; torchrun gets SIGTERM first, so that it can end its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5.0)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _reason(output: str) -> str:
    """Returns the first line of the output that names an error, or its last line."""
    lines = [line.strip() for line in output.split("\n") if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?([\w.]*(Error|Exception)|error): ", line)]
    return (errors or lines[-1:])[0][:200]


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """Returns the losses and gradient norms in TensorBoard's files of a folder, by step and name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, dict[str, float]] = {}
    for file in folder.glob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if "loss" in tag or tag == "grad-norm":
                for event in events.Scalars(tag):
                    found.setdefault(event.step, {})[tag] = event.value
    return found


def measured(output: str) -> Any:
    """Returns the JSON object that a command has printed after the word `measured`."""
    return json.loads(next(line for line in output.split("\n") if line.startswith("measured "))[9:])
