"""`python -m megatron_ext.rehearsal SCRIPT FLAGS`: runs a script in a process with the simulated device loaded.

The flag `--rehearse` starts this program once for each rehearsed rank.
"""

import os
import runpy
import sys
from pathlib import Path

from megatron_ext.config.command_line.error_lines import exit_with_error
from megatron_ext.platform.engine_imports import hide_transformer_engine
from megatron_ext.rehearsal.rehearse import MEMORY, REHEARSED_DEVICE
from megatron_ext.rehearsal.simulated import device_library
from megatron_ext.rehearsal.simulated.devices import device_named


def main() -> None:
    """Loads the simulated device, replaces torch's functions and runs the script."""
    try:
        device_library.load()
    except (OSError, ValueError) as error:
        exit_with_error(str(error))
    # Imported late, because this imports torch, which must find the device.
    from megatron_ext.rehearsal.rehearsed_rank import simulate

    # Simulate the device before the script reads its flags: with --load, the script then imports the engine, which
    # imports functions of torch by name. A script that is started directly, without --rehearse, simulates its device
    # itself.
    if REHEARSED_DEVICE in os.environ:
        memory = os.environ.get(MEMORY)
        simulate(device_named(os.environ[REHEARSED_DEVICE], float(memory) if memory else None))
    # Transformer Engine's kernels cannot run on fake tensors; `auto` then chooses megatron-core's linear layers.
    hide_transformer_engine("Transformer Engine is not rehearsed")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does when it starts a script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
