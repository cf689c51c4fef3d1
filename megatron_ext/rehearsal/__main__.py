"""`python -m megatron_ext.rehearsal SCRIPT FLAGS`: runs a script in a process that has the simulated device.

`--rehearse` starts it, once for each rank that is rehearsed.
"""

import runpy
import sys
from pathlib import Path

from megatron_ext.config.command_line.error_lines import exit_with_error
from megatron_ext.platform.engine_imports import hide_transformer_engine
from megatron_ext.rehearsal.simulated import device_library


def main() -> None:
    """Loads the simulated device and runs the script."""
    try:
        device_library.load()
    except (OSError, ValueError) as error:
        exit_with_error(str(error))
    # Its kernels cannot run on fake tensors; `auto` then chooses megatron-core's linear layers.
    hide_transformer_engine("Transformer Engine is not rehearsed")
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
