"""One training of a series by one command, such as an NPT layer or a phase of a growing model; each may be resumed."""

import time
from dataclasses import replace
from pathlib import Path

from megatron_ext.config.run_config import C
from megatron_ext.platform.collectives import on_first_rank
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint


def config_in(config: C, folder: Path, began: float) -> C:
    """The configuration of a training whose checkpoints are in `folder`, from where it goes on; collective.

    `--exit-duration-in-mins` counts from `began` (by `time.monotonic`), the command's start.
    """
    training, save = config.training, str(folder)
    goes_on = on_first_rank(lambda: find_checkpoint(save) is not None)
    if training.exit_duration_in_mins is not None:
        left = training.exit_duration_in_mins - (time.monotonic() - began) / 60
        training = replace(training, exit_duration_in_mins=max(1e-6, left))
    checkpoint = replace(config.checkpoint, save=save, load=save if goes_on else None)
    return replace(config, training=training, checkpoint=checkpoint)
