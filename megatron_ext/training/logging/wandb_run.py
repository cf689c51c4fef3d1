"""Weights & Biases, an optional second place for the values that TensorBoard gets.

W&B decides itself, by WANDB_MODE, whether it talks to a server: `offline` writes to the run's folder only. Curves go
over steps; W&B makes other axes from the logged `consumed-samples`.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.groups.logging_config import LoggingConfig


def check_wandb(logging: LoggingConfig) -> None:
    """Checks, on every rank, that W&B can be used if it is asked for.

    Raises:
        ValueError: it is asked for and not installed.
    """
    if logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb-project {logging.wandb_project}: wandb is not installed (pip install 'megatron-ext[wandb]')"
        )


class WandbRun:
    """One W&B run, on one rank. Values of one step are sent together."""

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
        """One value; all of a step are sent when the next step begins, or on `flush`."""
        if iteration != self._iteration:
            self.flush()
        self._iteration = iteration
        self._values[tag] = value

    def flush(self) -> None:
        """Sends what is collected; later values of the same step still join it."""
        if self._values:
            self._run.log(self._values, step=self._iteration)
            self._values = {}

    def close(self) -> None:
        """Sends the rest and ends the run."""
        self.flush()
        self._run.finish()
