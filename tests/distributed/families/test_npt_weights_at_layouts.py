"""NP weights and their moments move between parallel layouts."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun, read_plain
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.unit.npt.test_npt_family import LOW_RANK, OUTER, SINGLE, MakeNPT

KEY_VALUE = replace(LOW_RANK, np_form="key_value")


def _run(settings: NPTModuleConfig, parallel: ParallelConfig, **checkpoint: str) -> TinyRun:
    config = CheckpointConfig(**checkpoint)  # type: ignore[arg-type]
    return TinyRun(
        RunSettings(parallel=parallel, checkpoint=config, make_families=MakeNPT(settings), micro_batch_size=2)
    )


def _save_and_train(folder: str, settings: NPTModuleConfig, parallel: ParallelConfig) -> list[float]:
    run = _run(settings, parallel, save=folder)
    run.train(2)
    run.save()
    return run.train(2)


def _load_save_and_train(source: str, target: str, settings: NPTModuleConfig) -> list[float]:
    run = _run(settings, SINGLE, load=source, save=target)
    run.save()
    return run.train(2)


def _differences(first: str, second: str) -> tuple[set[str], list[str]]:
    initialize(SINGLE, seed=1)
    ours, theirs = (read_plain(f"{folder}/iter_0000002") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    return set(ours), [name for name in ours if not ours[name].equal(theirs[name])]


CHECKPOINTED = {
    "TP2+SP": (OUTER, LAYOUTS["TP2+SP"], 2),
    "PP2, a stage without NP layers": (OUTER, LAYOUTS["PP2"], 2),
    "TP2": (KEY_VALUE, LAYOUTS["TP2"], 2),
    "PP2 interleaved": (LOW_RANK, LAYOUTS["PP2 interleaved"], 2),
    "DP2 distributed optimizer": (OUTER, LAYOUTS["DP2 distributed optimizer"], 2),
}


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_weights_and_moments_move_between_layouts(case: str, tmp_path: Path) -> None:
    settings, parallel, world_size = CHECKPOINTED[case]
    first, second = f"{tmp_path}/layout", f"{tmp_path}/single"
    losses = run_distributed(_save_and_train, world_size, first, settings, parallel)[0]
    found = run_single(_load_save_and_train, first, second, settings)
    assert found == pytest.approx(losses, rel=1e-5)
    names, differences = run_single(_differences, first, second)
    assert differences == []
    moments = {name for name in names if "exp_avg" in name}
    assert moments and all(".feed_forward." in name for name in moments)
