"""Checkpoints of runs that train tables by rows: resumed to the bit, and exchanged with runs that train them whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.checkpoint_runs import TINY_WITH_DROPOUT, RunSettings, TinyRun, read_plain
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, WORLD_SIZES
from megatron_ext.training.interface.family_interface import Family

_ROWS = 2 * VOCAB_SIZE
_DENSE = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=_ROWS, per_layer_hidden_size=8)
_SPARSE = replace(_DENSE, per_layer_sparse=True)
_OTHERS = {
    name: replace(_SPARSE, per_layer_optimizer=name) for name in ("lazy_adam", "rowwise_adagrad", "sgd")
}
_SINGLE = ParallelConfig()


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, settings: PerLayerConfig) -> None:
        self.settings = settings

    def __call__(self) -> list[Family]:
        return [
            PerLayerFamily(
                self.settings, VOCAB_SIZE, [2 * token if token % 3 else 0 for token in range(VOCAB_SIZE)]
            )
        ]


def _run(
    settings: PerLayerConfig,
    parallel: ParallelConfig = _SINGLE,
    bf16: bool = False,
    model: ModelConfig = TINY_WITH_DROPOUT,
    **checkpoint: Any,
) -> TinyRun:
    config = CheckpointConfig(**checkpoint)
    return TinyRun(
        RunSettings(
            parallel=parallel,
            checkpoint=config,
            make_families=_Make(settings),
            precision="bf16" if bf16 else "fp32",
            model=model,
            micro_batch_size=2,
        )
    )


def _straight_and_resumed(
    folder: str, settings: PerLayerConfig, parallel: ParallelConfig, bf16: bool
) -> tuple[list[float], list[float], list[str]]:
    straight = _run(settings, parallel, bf16, save=f"{folder}/straight")
    straight.train(4)
    straight.save()
    losses = straight.train(4)
    straight.save()
    resumed = _run(settings, parallel, bf16, load=f"{folder}/straight", ckpt_step=4, save=f"{folder}/resumed")
    found = resumed.train(4)
    resumed.save()
    ours, theirs = (read_plain(f"{folder}/{name}/iter_0000008") for name in ("straight", "resumed"))
    assert ours.keys() == theirs.keys()
    return losses, found, [name for name in ours if not torch.equal(ours[name], theirs[name])]


_CASES = {
    "TP1": (_SPARSE, "TP1", False),
    "TP2+SP": (_SPARSE, "TP2+SP", False),
    "PP2 interleaved": (_SPARSE, "PP2 interleaved", False),
    "DP2 distributed optimizer bf16": (_SPARSE, "DP2 distributed optimizer", True),
    "lazy_adam bf16": (_OTHERS["lazy_adam"], "TP1", True),
    "rowwise_adagrad": (_OTHERS["rowwise_adagrad"], "DP2 distributed optimizer", False),
}


@pytest.mark.parametrize("case", _CASES)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(case: str, tmp_path: Path) -> None:
    settings, layout, bf16 = _CASES[case]
    results = run_distributed(
        _straight_and_resumed, WORLD_SIZES[layout], str(tmp_path), settings, LAYOUTS[layout], bf16
    )
    for losses, found, differing in results:
        assert found == losses
        assert differing == []


def _switched(folder: str, first: PerLayerConfig, second: PerLayerConfig, bf16: bool) -> tuple[Any, ...]:
    """Losses of a run that goes on as it began, and of one that goes on the other way; and what they saved."""
    straight = _run(first, bf16=bf16, save=f"{folder}/straight")
    straight.train(6)
    straight.save()
    losses = straight.train(6)
    straight.save()
    switched = _run(second, bf16=bf16, load=f"{folder}/straight", ckpt_step=6, save=f"{folder}/switched")
    found = switched.train(6)
    switched.save()
    return (
        losses,
        found,
        *(read_plain(f"{folder}/{name}/iter_0000012") for name in ("straight", "switched")),
    )


@pytest.mark.parametrize(
    ("first", "second", "bf16"), [(_DENSE, _SPARSE, False), (_SPARSE, _DENSE, False), (_SPARSE, _DENSE, True)]
)
def test_a_run_switches_between_whole_tables_and_rows_in_the_middle(
    first: PerLayerConfig, second: PerLayerConfig, bf16: bool, tmp_path: Path
) -> None:
    losses, found, ours, theirs = run_single(_switched, str(tmp_path), first, second, bf16)
    assert found == pytest.approx(losses, rel=2e-3 if bf16 else 1e-5)
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    table = "per_layer.layers.2.embedding.weight"
    for name in (table, f"optimizer.state.exp_avg.{table}", f"optimizer.state.exp_avg_sq.{table}"):
        assert ours[name].abs().max() > 0
        scale = ours[name].float().abs().max()
        tolerance = (2e-2 if bf16 else 1e-4) * scale
        assert (ours[name].float() - theirs[name].float()).abs().max() < tolerance, name


def _saved_elsewhere(folder: str, settings: PerLayerConfig, parallel: ParallelConfig) -> list[float]:
    run = _run(settings, parallel, model=TINY, save=folder)
    run.train(3)
    run.save()
    return run.train(3)


def _goes_on(folder: str, settings: PerLayerConfig) -> list[float]:
    return _run(settings, model=TINY, load=folder).train(3)


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        (_SPARSE, "DP2 distributed optimizer"),
        (_OTHERS["rowwise_adagrad"], "TP2"),
        (_OTHERS["sgd"], "PP2"),
    ],
)
def test_a_checkpoint_by_rows_goes_on_at_another_layout(
    settings: PerLayerConfig, layout: str, tmp_path: Path
) -> None:
    expected = run_distributed(_saved_elsewhere, 2, str(tmp_path), settings, LAYOUTS[layout])[0]
    assert run_single(_goes_on, str(tmp_path), settings) == pytest.approx(expected, rel=1e-5)


def _loading_error(folder: str, settings: PerLayerConfig) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        _run(settings, load=folder)
    return str(caught.value)


def test_state_that_a_checkpoint_lacks_is_named_with_what_to_do(tmp_path: Path) -> None:
    run_single(_saved_elsewhere, str(tmp_path), _OTHERS["sgd"], _SINGLE)
    message = run_single(_loading_error, str(tmp_path), _SPARSE)
    assert "contains no tensor optimizer.state.exp_avg.per_layer.layers.0.embedding.weight" in message
    assert message.endswith("add --no-load-optim")


def _async_checkpoint_during_training(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    run = _run(_SPARSE, save=f"{folder}/beside")
    run.train(3)
    run.checkpointer.begin_save(replace(run.progress))
    run.train(2)
    run.checkpointer.proceed_with_save(wait=True)
    again = _run(_SPARSE, save=f"{folder}/alone")
    again.train(3)
    again.save()
    return read_plain(f"{folder}/beside/iter_0000003"), read_plain(f"{folder}/alone/iter_0000003")


def test_a_save_beside_training_holds_the_tables_of_its_step(tmp_path: Path) -> None:
    # In a process of its own: a save beside training starts a thread.
    beside, alone = run_distributed(_async_checkpoint_during_training, 1, str(tmp_path))[0]
    assert beside.keys() == alone.keys()
    assert [name for name in beside if not torch.equal(beside[name], alone[name])] == []
