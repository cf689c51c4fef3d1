"""An imported Gemma 4 and 3n with frozen per-layer tables: the same training at TP2 and PP2, resumed on the other."""

from pathlib import Path

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.platform import process_groups
from megatron_ext.testing.checkpoint_runs import read_plain
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.optimizer_state import PREFIX
from tests.unit.interop.hf_models import KINDS, alone, tensors_in
from tools.convert_checkpoint import main

RUN = (
    "--finetune --freeze-per-layer-embedding --mock-data --micro-batch-size 1 --global-batch-size 4 --seq-length 32 "
    "--train-iters 4 --save-interval 2 --lr 1e-3 --lr-decay-style constant --eval-iters 0 --num-workers 0 --seed 3"
)
TP2, PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
TABLE = "model.embed_tokens_per_layer.weight"


def _saved(path: str) -> dict[str, torch.Tensor]:
    process_groups.initialize(ParallelConfig(), seed=1)
    return read_plain(str(find_checkpoint(path)))


def _train(*flags: str, processes: int = 1) -> None:
    done = run_script("pretrain_gpt_per_layer.py", *flags, processes=processes)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Gemma4", "Gemma3n"])
def test_frozen_tables_keep_every_bit_and_the_rest_trains_alike_at_every_layout(
    name: str, tmp_path: Path
) -> None:
    KINDS[name].build().save_pretrained(tmp_path / "hf")
    base = str(tmp_path / "base")
    assert alone(main, ["import", "--model-dir", str(tmp_path / "hf"), "--save", base]) == 0
    begin = ["--config", f"{base}/model.yaml", "--load", base, *RUN.split()]
    straight, moved = str(tmp_path / "straight"), str(tmp_path / "moved")
    _train(*begin, "--save", straight)
    _train(*begin, *TP2, "--exit-interval", "2", "--save", moved, processes=2)
    again = [flag for flag in RUN.split() if flag != "--finetune"]
    _train(*again, *PP2, "--load", moved, "--save", moved, processes=2)

    before, one, two = (alone(_saved, path) for path in (base, straight, moved))
    tables = {key for key in before if key.endswith("embedding.weight") and key.startswith("per_layer.")}
    assert len(tables) == KINDS[name].build().config.num_hidden_layers
    assert all(torch.equal(one[key], before[key]) and torch.equal(two[key], before[key]) for key in tables)
    assert not any(key.startswith(PREFIX) and ".embedding." in key and "per_layer" in key for key in two)
    assert one.keys() == two.keys()
    for key in before.keys() - tables:
        trained = torch.linalg.norm(one[key] - before[key])
        # Adam moves a value whose gradient is all rounding by as much as any other, and layouts round differently.
        assert torch.linalg.norm(two[key] - one[key]) <= 1e-2 * trained, key
        assert bool(trained == 0) == key.endswith("layer_scalar"), key

    assert alone(main, ["export", "--load", moved, "--model-dir", str(tmp_path / "exported")]) == 0
    first, last = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "exported")
    assert first.keys() == last.keys() and torch.equal(first[TABLE], last[TABLE])
