"""Configures one training run of a series that one command starts.

Such a series has one run per layer in NPT's sequential mode, and one run per phase in progressive growth.
"""

import time
from dataclasses import replace
from pathlib import Path

from megatron_ext.config.run_config import C
from megatron_ext.platform.collectives import on_first_rank
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint


def config_in(config: C, folder: Path, began: float) -> C:
    """Returns the configuration of a run that saves to `folder` and resumes from a checkpoint there if there is one.

    Collective.

    Args:
        config: configuration of the whole command.
        folder: directory of the run's checkpoints.
        began: start of the command (`time.monotonic`), from which `--exit-duration-in-mins` counts.
    """
    training, save = config.training, str(folder)
    goes_on = on_first_rank(lambda: find_checkpoint(save) is not None)
    if training.exit_duration_in_mins is not None:
        left = training.exit_duration_in_mins - (time.monotonic() - began) / 60
        # The option must be positive, so it cannot be 0. A value this small ends the run after its first step.
        training = replace(training, exit_duration_in_mins=max(1e-6, left))
    checkpoint = replace(config.checkpoint, save=save, load=save if goes_on else None)
    return replace(config, training=training, checkpoint=checkpoint)
