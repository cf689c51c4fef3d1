"""`--np-init-strategy calibrated` for low_rank and outer_product: how near they start, the layouts, training from it."""

import contextlib
import json
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.npt.runs.npt_model import NPTModel
from megatron_ext.npt.weights.np_weight_files import read_np_weight_file, write_np_weights
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from tests.integration.npt.npt_run_helpers import DATA, make_base, train, write_data

COMMON = [
    *("--np-init-strategy", "calibrated", "--calibration-tokens", "400", "--npt-layers", "1,3", "--np-rank", "12"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-3", "--mode", "multi_layer", *DATA),
]
KEEP = ["--np-target", "gate+up", "--np-residual", "keep"]
DROP = ["--np-target", "gate+up+down", "--np-residual", "drop"]
FORMS = {
    "low_rank": ["--np-form", "low_rank"],
    "low_rank k 2": ["--np-form", "low_rank", "--num-np-components", "2", "--np-rank", "6"],
    "outer_product": ["--np-form", "outer_product", "--no-np-normalize"],
    "outer_product k 2": ["--np-form", "outer_product", "--num-np-components", "2", "--np-rank", "6"],
    "outer_product normalized": ["--np-form", "outer_product", "--np-scale", "2"],
}


@dataclass(frozen=True)
class Prepared:
    """A base model and data."""

    root: Path
    base: str
    data: str

    def flags(self, name: str, *more: str) -> list[str]:
        """The flags of a run in the directory `name`."""
        return ["--load", self.base, "--data-path", self.data, "--save", str(self.root / name), *COMMON, *more]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("forms")
    data = write_data(root)
    return Prepared(root, run_single(make_base, str(root), data), data)


def _divergences(base: str, *files: str) -> list[float]:
    """KL(base || NPT) of each file's weights, on the same tokens, without an NPT layer's training."""
    tokens = torch.randint(0, 64, (200,), generator=torch.Generator().manual_seed(5)).unsqueeze(0)[:, :16]
    logits = []
    for file in (None, *files):
        model = NPTModel.from_pretrained(base)
        if file is not None:
            model.load_npt_weights(file)
        logits.append(model.logits(tokens).float().log_softmax(-1))
    expected = logits[0]
    return [float((expected.exp() * (expected - found)).sum(-1).mean()) for found in logits[1:]]
