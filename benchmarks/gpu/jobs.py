"""The jobs of `make gpu`: each runs some commands and returns the rows of the table that follow from them."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from check_runs import (
    CLUSTER,
    SCRIPTS,
    SPEED,
    STEPS,
    CommandFailed,
    losses,
    measured,
    memory_flags,
    run,
    training_flags,
)

OK, MISSED, MEASURED, SKIPPED, FAILED = "ok", "goal missed", "measured", "skipped", "FAILED"

Steps = Mapping[int, Mapping[str, float]]
"""Losses and gradient norms by step and name."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    verdict: str
    result: str
    goal: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine on which the jobs run, and figures that are known beforehand."""

    device: str
    """cuda or cpu."""

    gpus: int
    size: str
    """full or tiny."""

    folder: Path
    data: str
    """Prefix of the training data."""

    rehearsed: Mapping[str, Any]
    """The figures of `rehearsed.py` for this size; empty if no file was given."""

    datasheet: float | None
    """FLOP/s of dense bf16 products by the device's data sheet; None if unknown."""

    @property
    def is_cpu(self) -> bool:
        """Whether the checks run on the CPU, so that the commands must not see a GPU."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Job:
    """Rows that are measured together."""

    rows: tuple[str, ...]
    """Names of the job's rows; if the job fails, each of them gives the reason."""

    seconds: float
    """Time limit of the job on a GPU, in seconds; on a CPU it is three times as long."""

    work: Callable[[Machine, float], Sequence[Row]]
    """Function that measures the rows; its arguments are the machine, and the monotonic time at which it must end."""

    alone: bool = False
    """Whether no other job may run at the same time, because this job measures times."""


def all_jobs(machine: Machine) -> list[Job]:
    """Returns the jobs, in the order of the table."""
    jobs = [Job((f"{family}: torchrun, resume",), 180, partial(_train, family)) for family in SCRIPTS]
    jobs += [
        Job((f"{family}: CPU and {machine.device}",), 150, partial(_parity, family)) for family in SCRIPTS
    ]
    jobs.append(Job(("PLE: tensor parallel over 2",), 90, _two_processes))
    for family in SCRIPTS:
        jobs.append(Job((f"{family}: peak memory", f"{family}: waits"), 90, partial(_memory, family)))
    jobs.append(Job(("kernels",), 90, _kernels))
    peers = ("hugging face", "mcore", "ours + PLE", "ours + NPT")
    # On a GPU, two models at a time fit into its memory.
    for group in [peers] if machine.size == "tiny" else [(peer,) for peer in peers]:
        rows = tuple(f"speed: {name}" for name in ("ours", *group))
        jobs.append(Job(rows, 120, partial(_speed, group), alone=True))
    return jobs


def run_job(job: Job, machine: Machine, end: float) -> list[Row]:
    """Runs a job, at most until `end`, and returns its rows; if the job fails, each row gives the reason."""
    try:
        seconds = job.seconds * (3 if machine.is_cpu else 1)
        return list(job.work(machine, min(end, time.monotonic() + seconds)))
    except CommandFailed as error:
        reason = str(error)
    except Exception as error:  # a mistake in one job must not hide the others' rows
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
    return [Row(name, FAILED, reason) for name in job.rows]


class Training:
    """A family's small training run, which is started several times in a folder of its own."""

    def __init__(self, family: str, machine: Machine, name: str, until: float, *, fp32: bool = False) -> None:
        self.folder = machine.folder / f"{name}_{family}"
        self.folder.mkdir()
        self.family = family
        self.machine, self.until, self.fp32 = machine, until, fp32
        self._command = [SCRIPTS[family], *training_flags(family, machine.size, machine.data)]
        self._started = 0
        if family == "NPT":  # whose base model is trained for a step
            base = training_flags("base", machine.size, machine.data)
            run([SCRIPTS["PLE"], *base, "--save", f"{self.folder}/base"], until=until, on_cpu=True)
            self._command += ["--base-checkpoint", f"{self.folder}/base"]

    def run(self, place: str, *flags: str, processes: int = 0, on_cpu: bool | None = None) -> Steps:
        """Trains, and returns what the run has logged.

        Args:
            place: name of the folder in which the run saves; a run that is already there is continued.
            flags: further flags.
            processes: number of processes under torchrun; 0 starts one without it.
            on_cpu: whether to hide the GPUs; None for the machine's device.
        """
        self._started += 1
        logs, saved = self.folder / f"logs_{self._started}", str(self.folder / place)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        places = ["--save", saved, "--tensorboard-dir", str(logs)]
        places += [] if self.family == "progressive" else ["--load", saved]
        on_cpu = self.machine.is_cpu if on_cpu is None else on_cpu
        command = [*(launcher if processes else []), *self._command, *places, *flags]
        run(command, until=self.until, on_cpu=on_cpu, fp32=self.fp32)
        return losses(logs)


def _train(family: str, machine: Machine, until: float) -> list[Row]:
    training = Training(family, machine, "train", until)
    whole = training.run("whole", *CLUSTER.split())
    first = training.run("parts", *CLUSTER.split(), "--exit-interval", "2", processes=1)
    rest = training.run("parts", *CLUSTER.split(), processes=1)
    text = f"bf16, {'gloo' if machine.is_cpu else 'NCCL'}, {STEPS} steps; saved and resumed after 2 under torchrun: "
    # On a GPU, some kernels add in no fixed order.
    tolerance = 0.0 if machine.is_cpu else 2e-2
    return [
        _agreement(
            f"{family}: torchrun, resume", whole, {1: first, 2: first, 3: rest, 4: rest}, tolerance, text
        )
    ]


def _parity(family: str, machine: Machine, until: float) -> list[Row]:
    """Compares two steps on the CPU, one on the device and one on the CPU with the same four steps on the CPU."""
    training = Training(family, machine, "parity", until, fp32=True)
    whole = training.run("whole", on_cpu=True)
    training.run("parts", "--exit-interval", "2", on_cpu=True)
    there = training.run("parts", "--exit-interval", "3")
    back = training.run("parts", on_cpu=True)
    text = f"fp32, step 3 on {machine.device} from the CPU's checkpoint, step 4 on the CPU from step 3's: "
    tolerance = 0.0 if machine.is_cpu else 1e-3
    return [_agreement(f"{family}: CPU and {machine.device}", whole, {3: there, 4: back}, tolerance, text)]


def _two_processes(machine: Machine, until: float) -> list[Row]:
    name = "PLE: tensor parallel over 2"
    if not machine.is_cpu and machine.gpus < 2:
        return [Row(name, SKIPPED, f"needs 2 GPUs, this machine has {machine.gpus}")]
    training = Training("PLE", machine, "tensor", until, fp32=True)
    single = training.run("single")
    split = training.run("split", "--tensor-model-parallel-size", "2", "--sequence-parallel", processes=2)
    return [_agreement(name, single, dict.fromkeys(single, split), 1e-3, "fp32, against one process: ")]


def _agreement(name: str, expected: Steps, found: Mapping[int, Steps], tolerance: float, text: str) -> Row:
    """Compares losses and gradient norms by relative difference.

    Args:
        name: name of the row.
        expected: values of the reference run.
        found: for each step that is compared, the values of the run that made it.
        tolerance: largest difference.
        text: beginning of the row's result.
    """
    missing = [step for step, values in found.items() if step not in values or step not in expected]
    if missing or not found:
        raise CommandFailed(f"steps {missing} were not logged")
    pairs = [(value, found[step][step][key]) for step in found for key, value in expected[step].items()]
    worst = max((abs(other - value) / max(abs(value), 1e-2) for value, other in pairs), default=math.inf)
    verdict = OK if worst <= tolerance else FAILED  # FAILED for NaN too
    goal = f"<= {tolerance:.0e}" if tolerance else "equal"
    return Row(name, verdict, f"{text}{len(pairs)} losses and gradient norms differ by {worst:.1e}", goal)


def _memory(family: str, machine: Machine, until: float) -> list[Row]:
    names = f"{family}: peak memory", f"{family}: waits"
    if not machine.rehearsed:
        return [Row(name, SKIPPED, "needs --rehearsed FILE, see docs/gpu.md") for name in names]
    expected = machine.rehearsed["runs"][family]
    command = ["benchmarks/gpu/measured_run.py", SCRIPTS[family], *memory_flags(family, machine.size)]
    found = measured(run([*command, "--rehearse"], until=until, on_cpu=machine.is_cpu))
    goal = 0.05 if machine.is_cpu else 0.03
    apart = expected["peak"] / found["peak"] - 1
    text = f"{_mib(found['peak'])} MiB, rehearsed {_mib(expected['peak'])} ({100 * apart:+.1f} %)"
    if machine.is_cpu:
        waits = Row(names[1], SKIPPED, f"needs CUDA; rehearsed {expected['waits']}")
    else:
        text += f"; reserved {_mib(found['reserved'])}"
        count = sum(found["waits"].values())
        listed = ", ".join(f"{number} {call}" for call, number in found["waits"].items())
        reached = _verdict(count <= expected["waits"])
        result = f"{count} in a step ({listed}), {found['copies']} copies to the host"
        waits = Row(names[1], reached, result, f"rehearsed {expected['waits']}")
    return [Row(names[0], _verdict(abs(apart) <= goal), text, f"within {goal:.0%}"), waits]


def _verdict(reached: bool) -> str:
    return OK if reached else MISSED


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f}"


def _kernels(machine: Machine, until: float) -> Iterator[Row]:
    found = measured(
        run(["benchmarks/gpu/kernels.py", machine.size], until=until, on_cpu=machine.is_cpu, fp32=True)
    )
    for name, values in found.items():
        if "error" in values:
            yield Row(name, FAILED, values["error"])
            continue
        text = f"kept {_mib(values['kept'])} MiB, peak {_mib(values['peak'])}"
        expected = machine.rehearsed.get("kernels", {}).get(name)
        # On a CPU, torch's kernels are others than those that the rehearsal stands for.
        verdict, goal = MEASURED, ""
        if expected is not None:
            text += f"; rehearsed {_mib(expected['kept'])}, {_mib(expected['peak'])}"
            if not machine.is_cpu:
                apart = max(abs(expected[key] / values[key] - 1) for key in ("kept", "peak"))
                verdict, goal = _verdict(apart <= 0.03), "within 3%"
        yield Row(name, verdict, f"{text}; {values['kernel']}".rstrip("; "), goal)


def _speed(group: tuple[str, ...], machine: Machine, until: float) -> Iterator[Row]:
    output = machine.folder / f"speed_{group[0]}.json"
    command = [
        "benchmarks/gpt.py",
        *SPEED[machine.size].split(),
        "--precisions",
        "bf16",
        "--output",
        str(output),
    ]
    try:
        run([*command, "--variants", "ours", *group], until=until, on_cpu=machine.is_cpu)
    except CommandFailed:
        if not output.is_file():  # else a model failed; the file has the reason, and the others' results
            raise
    found = json.loads(output.read_text(encoding="utf-8"))
    values = found["precisions"]["bf16"]
    for name in ("ours", *group):
        if name in values["failed"]:
            yield Row(f"speed: {name}", FAILED, values["failed"][name])
        elif name == "ours":
            yield _utilization(found, values["times"], machine)
        else:
            yield _compared(name, found, values["times"])


def _utilization(found: Mapping[str, Any], times: Mapping[str, Sequence[float]], machine: Machine) -> Row:
    gemm = 1.0 / statistics.median(times["gemm"])
    rates = [found["flops"] / statistics.median(times[f"ours {part}"]) for part in ("fb", "step")]
    speed = found["tokens"] / statistics.median(times["ours step"])
    shares = " and ".join(f"{rate / gemm:.2f}" for rate in rates)
    text = f"{speed:.0f} tokens/s; forward+backward and step use {shares} of the GEMM rate, {gemm / 1e12:.1f} TFLOP/s"
    if machine.datasheet is None:
        return Row("speed: ours", MEASURED, text)
    used = [rate / machine.datasheet for rate in rates]
    text += f"; MFU {used[0]:.3f} and {used[1]:.3f} of {machine.datasheet / 1e12:.0f}"
    return Row("speed: ours", _verdict(used[1] >= 0.5), text, "MFU of the step >= 0.50")


def _compared(name: str, found: Mapping[str, Any], times: Mapping[str, Sequence[float]]) -> Row:
    if "ours step" not in times:
        raise CommandFailed("the variant `ours` failed, so that there are no times to compare with")
    ratios = [
        statistics.median(x / y for x, y in zip(times[f"{name} {part}"], times[f"ours {part}"], strict=True))
        for part in ("fb", "step")
    ]
    text = f"{found['tokens'] / statistics.median(times[f'{name} step']):.0f} tokens/s; "
    share = found["flop_shares"].get(name)
    if share is None:
        text += f"ours / this: forward+backward {ratios[0]:.2f}, step {ratios[1]:.2f}"
    else:
        parts = zip(("forward+backward", "the step"), ratios, strict=True)
        added = ", ".join(f"{100 * (ratio - 1):+.1f} % to {part}" for part, ratio in parts)
        text += f"adds {100 * share:.1f} % to the FLOPs, {added}"
    return Row(f"speed: {name}", MEASURED, text)
