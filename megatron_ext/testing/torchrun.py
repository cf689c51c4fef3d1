"""Makes the command that starts a training script under `torchrun`, and the environment of this command."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(script: str, *flags: str, processes: int = 2) -> list[str]:
    """Returns the command that runs a script under `torchrun`, or without a launcher if `processes` is 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes else []), str(ROOT / script), *flags]


def environment() -> dict[str, str]:
    """Returns this process's environment without the variables that would make a new command a rank of this run."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    mine = {name: value for name, value in os.environ.items() if name not in names}
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
