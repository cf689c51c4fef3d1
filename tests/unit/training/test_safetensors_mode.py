"""Files in the safetensors format can be read by those who can read the files beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_ext.interop.formats.hf_files import SINGLE_FILE, write_safetensors
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.weights.np_weight_files import write_np_weights


@pytest.fixture(params=[0o022, 0o027])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file under the test's umask."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def _mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_an_exported_model_has_the_mode_of_the_umask(mode: int, tmp_path: Path) -> None:
    write_safetensors(tmp_path, [([("a", 4)], lambda: [torch.ones(1)])], 100)
    assert _mode_of(tmp_path / SINGLE_FILE) == mode


def test_np_weights_have_the_mode_of_the_umask(mode: int, tmp_path: Path) -> None:
    write_np_weights(tmp_path, {"layer_1_np.gate.c": torch.ones(1)}, NPTModuleConfig())
    modes = {path.name: _mode_of(path) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("npt_weights.pt", "npt_weights.safetensors", "config.json"), mode)
