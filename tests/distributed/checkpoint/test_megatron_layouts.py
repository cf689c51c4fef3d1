"""Checkpoints that megatron-core wrote on two ranks, in each format of its optimizers, imported in one process.

`kept_megatron` was written by megatron-core 0.13.1 on two data-parallel ranks with `Run` of `megatron_checkpoints`. Its
distributed optimizer is in the format `fully_sharded_model_space`, which later versions do not write.
"""

from pathlib import Path

import pytest

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.distributed.checkpoint.megatron_checkpoints import CASES, ROWS, STEPS, Run
from tests.distributed.checkpoint.megatron_imports import imported, our_losses

LAYOUTS_AND_FORMATS: dict[str, tuple[str, ParallelConfig, str | None]] = {
    "TP2": ("Llama", LAYOUTS["TP2"], None),
    "TP2, tied": ("GPT-3", LAYOUTS["TP2"], None),
    "PP2, tied": ("GPT-3", LAYOUTS["PP2"], None),
    "DP2": ("Llama", LAYOUTS["DP2"], None),
    "DP2, fully_reshardable": ("Llama", LAYOUTS["DP2 distributed optimizer"], "fully_reshardable"),
    "DP2, fully_reshardable, bf16": ("bf16", LAYOUTS["DP2 distributed optimizer"], "fully_reshardable"),
}


def _write(name: str, parallel: ParallelConfig, sharding: str | None, folder: str) -> list[float]:
    run = Run(CASES[name], parallel, sharding)
    run.train(STEPS)
    run.save(Path(folder), STEPS)
    return run.train(2)


@pytest.mark.parametrize("layout", LAYOUTS_AND_FORMATS)
def test_a_run_of_two_ranks_continues_in_one_process(layout: str, tmp_path: Path) -> None:
    name, parallel, sharding = LAYOUTS_AND_FORMATS[layout]
    losses, _ = run_distributed(_write, 2, name, parallel, sharding, str(tmp_path / "theirs"))
    imported(tmp_path / "theirs", tmp_path / "ours", with_optimizer=True)
    tolerance = 2e-2 if CASES[name].bf16 else 1e-6
    assert our_losses(tmp_path / "ours", CASES[name].bf16) == pytest.approx(losses, rel=tolerance)


def test_a_checkpoint_of_an_old_engine_continues(tmp_path: Path) -> None:
    kept = Path(__file__).with_name("kept_megatron")
    imported(kept, tmp_path / "ours", with_optimizer=True)
    losses = [4.605439186096191, 4.635054111480713]  # of the two steps that 0.13.1 did after the save
    assert our_losses(tmp_path / "ours", bf16=False) == pytest.approx(losses, rel=1e-6)


def test_the_default_format_of_the_distributed_optimizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    theirs = str(tmp_path / "theirs")
    run_distributed(_write, 2, "Llama", LAYOUTS["DP2 distributed optimizer"], "dp_reshardable", theirs)
    with pytest.raises(ValueError, match="dp_reshardable.*save it with --dist-ckpt-optim-fully-reshardable"):
        imported(tmp_path / "theirs", tmp_path / "ours", with_optimizer=True)
    assert imported(tmp_path / "theirs", tmp_path / "ours").rows == ROWS
