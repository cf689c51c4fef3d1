"""Logs TensorBoard's values to Weights & Biases as well, if `--wandb-project` is given.

With the environment variable WANDB_MODE=offline W&B contacts no server and writes to the run's directory only. The x
axis of all curves is the step; to plot over samples, choose `consumed-samples` as the x axis in W&B.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.groups.logging_config import LoggingConfig


def check_wandb(logging: LoggingConfig) -> None:
    """Checks that W&B is installed if it is requested.

    Raises:
        ValueError: W&B is requested but not installed.
    """
    if logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb-project {logging.wandb_project}: wandb is not installed (pip install 'megatron-ext[wandb]')"
        )


class WandbRun:
    """One W&B run, on rank 0; the values of a step are sent together."""

    def __init__(self, logging: LoggingConfig, configuration: Mapping[str, Any]) -> None:
        import wandb

        if logging.wandb_save_dir is not None:
            Path(logging.wandb_save_dir).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_exp_name,
            tags=logging.wandb_tags,
            dir=logging.wandb_save_dir,
            config=dict(configuration),
        )
        self._iteration = 0
        self._values: dict[str, float] = {}

    def scalar(self, tag: str, value: float, iteration: int) -> None:
        """Adds a value; the values of a step are sent when the next step begins, or on `flush`."""
        if iteration != self._iteration:
            self.flush()
        self._iteration = iteration
        self._values[tag] = value

    def flush(self) -> None:
        """Sends the collected values; W&B still accepts later values of the same step."""
        if self._values:
            self._run.log(self._values, step=self._iteration)
            self._values = {}

    def close(self) -> None:
        """Sends the remaining values and ends the run."""
        self.flush()
        self._run.finish()
