"""A model with PLE and NPT layers exports to the same bytes whatever parallel layout its checkpoint was saved at."""

from pathlib import Path

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.unit.interop.code_models import CASES, open_run
from tests.unit.interop.hf_models import alone, tensors_in
from tools.convert_checkpoint import main

NAMES = ("PLE concat after", "PLE gemma4", "NPT outer_product, components", "PLE and NPT")


def _train(path: str, layout: str) -> None:
    for number, name in enumerate(NAMES):
        run = open_run(CASES[name], CheckpointConfig(save=f"{path}/{layout}_{number}"), LAYOUTS[layout])
        run.train(2)
        run.save()


def _save_again(path: str, layout: str) -> None:
    """Loads what was trained at two tensor ranks and saves it at another layout."""
    for number, name in enumerate(NAMES):
        folders = CheckpointConfig(load=f"{path}/TP2_{number}", save=f"{path}/again_{layout}_{number}")
        open_run(CASES[name], folders, LAYOUTS[layout]).save()


def _export(path: str, names: list[str]) -> None:
    for name in names:
        argv = [
            "export",
            "--load",
            f"{path}/{name}",
            "--model-dir",
            f"{path}/hf_{name}",
            "--max-shard-size",
            "20KB",
        ]
        assert main(argv) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts")
    for layout in ("TP2", "PP2"):
        run_distributed(_train, 2, str(path), layout)
    run_distributed(_save_again, 2, str(path), "PP2")
    alone(_save_again, str(path), "TP1")
    numbers = range(len(NAMES))
    saved = [f"{save}_{n}" for save in ("TP2", "PP2", "again_PP2", "again_TP1") for n in numbers]
    alone(_export, str(path), saved)
    return path


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_the_same_model_saved_at_two_stages_and_in_one_process_exports_to_the_same_bytes(
    number: int, folder: Path
) -> None:
    first = {file.name: file.read_bytes() for file in (folder / f"hf_TP2_{number}").iterdir()}
    assert len(first) > 4
    for save in ("again_PP2", "again_TP1"):
        place = folder / f"hf_{save}_{number}"
        assert {file.name: file.read_bytes() for file in place.iterdir()} == first


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_training_at_two_tensor_ranks_and_at_two_stages_exports_the_same_model(
    number: int, folder: Path
) -> None:
    at_tensor_ranks, at_stages = (tensors_in(folder / f"hf_{save}_{number}") for save in ("TP2", "PP2"))
    assert at_tensor_ranks.keys() == at_stages.keys()
    for name, tensor in at_tensor_ranks.items():
        torch.testing.assert_close(at_stages[name], tensor, atol=1e-4, rtol=1e-4)
