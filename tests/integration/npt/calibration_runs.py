"""What the tests of calibrated starts share: a base model with data, layouts, and a calibration that is killed."""

import contextlib
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.npt.weights.np_weight_files import write_np_weights
from megatron_ext.testing.run_single import run_single
from tests.integration.npt.npt_run_helpers import make_base, train, write_data

LAYOUTS = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    "TP2+SP": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "DP2": [],
    "CP2": ["--context-parallel-size", "2"],
}


@dataclass(frozen=True)
class Prepared:
    """A base model and data."""

    root: Path
    base: str
    data: str
    common: list[str]
    """Flags of every run."""

    @classmethod
    def make(cls, root: Path, common: list[str]) -> "Prepared":
        """Writes the data and trains the base model."""
        data = write_data(root)
        return cls(root, run_single(make_base, str(root), data), data, common)

    def flags(self, name: str, *more: str) -> list[str]:
        """The flags of a run in the directory `name`."""
        where = ["--load", self.base, "--data-path", self.data, "--save", str(self.root / name)]
        return [*where, *self.common, *more]


def killed_calibration(*flags: str) -> None:
    """A calibration that ends when its first files are written; in a process of `run_single`."""

    def die(*arguments: Any, **options: Any) -> None:
        write_np_weights(*arguments, **options)
        raise KeyboardInterrupt

    with (
        unittest.mock.patch("megatron_ext.npt.weights.state_files.write_np_weights", die),
        contextlib.suppress(KeyboardInterrupt),
    ):
        train(*flags)
