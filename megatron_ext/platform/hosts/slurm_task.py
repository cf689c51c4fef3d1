"""Starts a script as one task of a Slurm step (one training process), without `torchrun`.

    srun python -m megatron_ext.platform.hosts.slurm_task SCRIPT FLAGS ...

examples/multi_node/slurm.sbatch calls it. MASTER_ADDR and MASTER_PORT name the endpoint where the processes meet; the
network interface is found in the same way as in the launcher.
"""

import os
import sys

from megatron_ext.config.command_line.error_lines import run_main
from megatron_ext.platform.hosts.host_addresses import Endpoint
from megatron_ext.platform.hosts.interfaces import take_interface


def main() -> None:
    """Sets the environment variables that `torchrun` would set, and replaces itself with the script.

    Raises:
        ValueError, OSError: the endpoint's name does not resolve, or no route leads to it; the message is one line.
    """
    os.environ["RANK"], os.environ["LOCAL_RANK"] = os.environ["SLURM_PROCID"], os.environ["SLURM_LOCALID"]
    endpoint = Endpoint("MASTER_ADDR:MASTER_PORT", f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
    take_interface(endpoint)
    # The process keeps its id, so that srun's signals reach the script, and srun sees the script's exit code.
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    run_main(main)
