"""A tiny model that hosts of a test network train together with examples/multi_node/launch.sh."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ext.testing.torchrun import ROOT
from tests.integration.hosts.network_hosts import Host, Started
from tests.integration.npt.npt_run_helpers import VOCABULARY

LAUNCHER = ["bash", str(ROOT / "examples" / "multi_node" / "launch.sh")]
PORT = 29400
MODEL = shlex.split(
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --swiglu --disable-bias-linear "
    f"--hidden-dropout 0 --attention-dropout 0 --tokenizer-type NullTokenizer --vocab-size {VOCABULARY} "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --split 100,0,0 --eval-iters 0 --log-interval 1 "
    "--num-workers 0 --device-peak-tflops 1 --distributed-timeout-minutes 1"
)


def flags(data: str, save: Path, *more: str) -> list[str]:
    """The flags of a run that goes on from what its directory holds."""
    return [*MODEL, "--data-path", data, "--save", str(save), "--load", str(save), *more]


def launch(
    hosts: Sequence[Host], folder: Path, arguments: Sequence[str], *, processes: int, **variables: str
) -> list[Started]:
    """Starts the launcher on every host; the endpoint is the first one's address in the network of all."""
    return [launch_on(host, hosts, folder, arguments, processes=processes, **variables) for host in hosts]


def launch_on(
    host: Host,
    hosts: Sequence[Host],
    folder: Path,
    arguments: Sequence[str],
    *,
    processes: int,
    **variables: str,
) -> Started:
    """Starts the launcher on one host of a run."""
    settings = {
        "PYTHON": sys.executable,
        "NNODES": str(len(hosts)),
        "NPROC_PER_NODE": str(processes),
        "RDZV_ENDPOINT": f"{hosts[0].address}:{PORT}",
    }
    log = folder / f"{host.name}-{len(host.started)}.log"
    return host.launch(log, *LAUNCHER, *arguments, **{**settings, **variables})


def wait_for(condition: Callable[[], object], started: Sequence[Started], seconds: float = 150.0) -> None:
    """Waits until a condition holds; fails with all output if it takes too long or a launcher ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [one.process.poll() for one in started]
        assert time.monotonic() < deadline and ended == [None] * len(started), all_output(started)
        time.sleep(0.05)


def all_output(started: Sequence[Started]) -> str:
    """What all launchers have printed."""
    return "\n".join(f"--- {one.log.name}\n{one.output()}" for one in started)


def steps(text: str) -> dict[int, str]:
    """The values of each step that depend on the model, as printed: losses and gradient norm."""
    found = {}
    for line in text.splitlines():
        step = re.match(r"step +(\d+)/", line)
        if step:
            values = re.findall(r"(lm loss|grad norm) ([0-9.e+-]+)", line)
            found[int(step[1])] = " ".join(f"{name} {value}" for name, value in values)
    return found


def error_lines(text: str) -> list[str]:
    """The lines that report errors."""
    return [line for line in text.splitlines() if line.startswith("error: ")]
