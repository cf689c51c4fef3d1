"""Rehearses scripts in forks of a process that has already imported everything; each rehearsal takes about a second.

`--rehearse` itself starts a new process for each rank, which takes some seconds. A test of `--rehearse` must run the
script.
"""

import atexit
import functools
import json
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.rehearsal.recording.activity import Activity
from megatron_ext.rehearsal.recording.memory_log import Peak
from megatron_ext.testing.torchrun import ROOT, environment

_SERVER = Path(__file__).with_name("rehearsal_server.py")


@dataclass(kw_only=True)
class Rehearsed:
    """The record of a rehearsed rank, or the error that ended it."""

    error: str | None = None
    """Name and message of the exception; None if the rehearsal succeeded."""

    activity: Activity = field(default_factory=Activity)
    peak: Peak = field(default_factory=lambda: Peak(0, Counter(), Counter(), ("", "")))
    parameters: int = 0
    flops: int = 0
    bubble: float = 0.0
    notes: list[str] = field(default_factory=list)
    """Notes of the report, for example about CPU tensors in collectives or groups that no step uses."""

    @property
    def step(self) -> str:
        """The name under which the recorder counts the last step, such as `step 2`."""
        return f"step {self.activity.step}"

    def waits(self) -> dict[str, int]:
        """Counts how often the host waits in the last step, for each place in the code (without line numbers)."""
        found: Counter[str] = Counter()
        for (scope, kind, place), count in self.activity.waits.items():
            if scope == self.step:
                found[f"{kind}, {place.split(' < ')[-1].partition(':')[0]}"] += count
        return dict(found)

    def groups(self) -> set[str]:
        """Returns the names of the groups over which the last step communicates."""
        return {
            call.group for scope, call in self.activity.communication if scope == self.step and call.size > 1
        }


def rehearse(
    script: str,
    *flags: str,
    processes: int,
    rank: int = 0,
    before: Callable[[], None] | None = None,
) -> Rehearsed:
    """Rehearses a script's run.

    Args:
        script: path relative to the root of the repository.
        flags: command line of the script, without --rehearse.
        processes: number of processes of the run.
        rank: the rank to rehearse.
        before: function that the rehearsal's process calls first; it is loaded from the test file that defines it.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    place = {
        "RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        request = {
            "script": str(ROOT / script),
            "flags": [*flags, "--rehearse"],
            "environment": {name: str(value) for name, value in place.items()},
            "before": None if before is None else (before.__code__.co_filename, before.__name__),
            "result": str(result),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "done\n"
        rehearsed: Rehearsed = pickle.loads(result.read_bytes())
    return rehearsed


@functools.cache
def _server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-W", "ignore", "-m", "megatron_ext.rehearsal", str(_SERVER)]
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # closes its input, at which it ends
    return server
