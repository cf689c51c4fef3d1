"""Checkpoints of a run with a family: its parameters, their moments and its configuration are in them, at any
parallel layout.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun, read_plain
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, VOCAB_SIZE
from megatron_ext.training.interface.family_interface import Family

_ROWS = 24
_PLE = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=_ROWS, per_layer_hidden_size=8)
_DISTRIBUTED_PP2 = ParallelConfig(use_distributed_optimizer=True, pipeline_model_parallel_size=2)
_CASES = {
    "TP2+SP": (LAYOUTS["TP2+SP"], 2),
    "PP2 interleaved": (LAYOUTS["PP2 interleaved"], 2),
    "DP2xPP2 distributed optimizer": (_DISTRIBUTED_PP2, 4),
}
_SINGLE = ParallelConfig()


@dataclass(frozen=True)
class _WithPerLayerEmbedding:
    """Makes the families of a run; travels to the processes by pickle."""

    settings: PerLayerConfig = _PLE

    def __call__(self) -> list[Family]:
        return [PerLayerFamily(self.settings, VOCAB_SIZE, [token % _ROWS for token in range(VOCAB_SIZE)])]


def _run(parallel: ParallelConfig, settings: PerLayerConfig = _PLE, **checkpoint: str) -> TinyRun:
    config = CheckpointConfig(**checkpoint)  # type: ignore[arg-type]
    families = _WithPerLayerEmbedding(settings)
    return TinyRun(
        RunSettings(parallel=parallel, checkpoint=config, make_families=families, micro_batch_size=2)
    )


def _save_and_train(folder: str, parallel: ParallelConfig) -> list[float]:
    run = _run(parallel, save=folder)
    run.train(2)
    run.save()
    return run.train(2)


def _load_save_and_train(source: str, target: str, parallel: ParallelConfig) -> list[float]:
    run = _run(parallel, load=source, save=target)
    run.save()
    return run.train(2)


def _differences(first: str, second: str) -> tuple[int, list[str]]:
    from megatron_ext.platform.process_groups import initialize

    initialize(_SINGLE, seed=1)
    ours, theirs = (read_plain(f"{folder}/iter_0000002") for folder in (first, second))
    assert ours.keys() == theirs.keys()
    family = sum("per_layer" in name for name in ours)
    return family, [name for name in ours if not ours[name].equal(theirs[name])]


@pytest.mark.parametrize("layout", _CASES)
def test_per_layer_parameters_and_moments_move_between_layouts(layout: str, tmp_path: Path) -> None:
    parallel, world_size = _CASES[layout]
    first, second = f"{tmp_path}/layout", f"{tmp_path}/single"
    losses = run_distributed(_save_and_train, world_size, first, parallel)[0]
    found = run_single(_load_save_and_train, first, second, _SINGLE)
    assert found == pytest.approx(losses, rel=1e-5)
    count, differences = run_single(_differences, first, second)
    assert count > 10 and differences == []


def _loading_errors(folder: str, others: list[PerLayerConfig]) -> list[str]:
    errors = []
    for settings in others:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            _run(_SINGLE, settings, load=folder)
        errors.append(str(caught.value))
    _run(_SINGLE, replace(_PLE, per_layer_lr_scale=0.5), load=folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        TinyRun(RunSettings(parallel=_SINGLE, checkpoint=CheckpointConfig(load=folder)))
    return [*errors, str(caught.value)]


def test_another_per_layer_embedding_is_refused_with_its_flag(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_single(_save_and_train, folder, _SINGLE)
    others = [replace(_PLE, per_layer_hidden_size=16), replace(_PLE, per_layer_gate_activation="relu")]
    size, activation, without = run_single(_loading_errors, folder, others)
    assert size == f"--per-layer-hidden-size 16: the checkpoint {folder}/iter_0000002 was made with 8"
    assert activation.startswith("--per-layer-gate-activation relu: ")
    assert (
        without
        == f"{folder}/iter_0000002: the checkpoint uses the model family per_layer, which this run does not use"
    )
