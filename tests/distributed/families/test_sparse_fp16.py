"""Tables that are trained by rows (--per-layer-sparse) in fp16: loss scale, skipped steps, losses."""

from dataclasses import replace
from typing import cast

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.optimizer_config import OptimizerSettings
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.per_layer.per_layer_inputs import stage_module
from megatron_ext.per_layer.sparse.row_optimizer import RowOptimizer
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE
from megatron_ext.training.engine.training_step import StepResult
from megatron_ext.training.interface.family_interface import Family
from megatron_ext.training.interface.own_optimizer import bring_up_to_date, own_optimizers

_SPARSE = PerLayerConfig(
    use_per_layer_embedding=True,
    per_layer_vocab_size=4 * VOCAB_SIZE,
    per_layer_hidden_size=8,
    per_layer_init_std=0.2,
    per_layer_sparse=True,
)
_DENSE = replace(_SPARSE, per_layer_sparse=False)
# The first scale overflows, and so does the one to which it rises again.
_RISING = OptimizerSettings(lr=5e-3, initial_loss_scale=2.0**22, loss_scale_window=3, hysteresis=1)
# Nothing overflows at this scale.
_LOW = replace(_RISING, initial_loss_scale=2.0**10, loss_scale_window=100)
# As rows are summed; otherwise the engine sums gradients in fp16.
_SUMS = ParallelConfig(accumulate_allreduce_grads_in_fp32=True)
_DIVIDED = replace(_SUMS, use_distributed_optimizer=True)


def _families(settings: PerLayerConfig) -> list[Family]:
    return [PerLayerFamily(settings, VOCAB_SIZE, [4 * token for token in range(VOCAB_SIZE)])]


def _run(
    settings: PerLayerConfig, parallel: ParallelConfig, optimizer: OptimizerSettings = _RISING
) -> TinyRun:
    return TinyRun(
        RunSettings(
            parallel=parallel,
            checkpoint=CheckpointConfig(),
            model=replace(TINY, num_layers=2),
            optimizer=optimizer,
            precision="fp16",
            make_families=lambda: _families(settings),
        )
    )


def _steps(settings: PerLayerConfig, parallel: ParallelConfig) -> list[StepResult]:
    run = _run(settings, parallel)
    return [run.stepper.train(run._batches, iteration) for iteration in range(1, 15)]


def _compare(rows: list[StepResult], whole: list[StepResult]) -> None:
    assert whole[0].is_overflow and 2 <= sum(step.skipped for step in whole) <= 9, "needs steps of both kinds"
    for ours, theirs in zip(rows, whole, strict=True):
        assert (ours.skipped, ours.is_overflow) == (theirs.skipped, theirs.is_overflow)
        assert ours.loss_scale == theirs.loss_scale
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)  # two units in the last place of fp16
        if not ours.skipped:
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)
    assert rows[-1].loss < rows[0].loss


def test_losses_scales_and_skipped_steps_are_those_of_whole_tables() -> None:
    _compare(*(run_single(_steps, settings, _SUMS) for settings in (_SPARSE, _DENSE)))


def _both(parallel: ParallelConfig) -> tuple[list[StepResult], list[StepResult]]:
    return _steps(_SPARSE, parallel), _steps(_DENSE, parallel)


def _with_overflowing_row(parallel: ParallelConfig) -> tuple[bool, float, bool]:
    """A step in which one gradient of one row on the last rank is infinite, and nothing else.

    Whether the step is finite, the loss scale after it, whether the tables are as before.
    """
    run = _run(_SPARSE, parallel, _LOW)
    run.train(4)
    assert run.loss_scales == [_LOW.initial_loss_scale] * 4
    bring_up_to_date(run.optimizer)
    (own,) = own_optimizers(run.optimizer)
    rows = cast(RowOptimizer, own)
    before = [table.detach().clone() for table in stage_module(run.chunks[0]).tables()]
    values = run.stepper.forward_backward(run._batches)
    if rows.data_group.rank() == rows.data_group.size() - 1:
        rows._rows.gradient[0, 0, 0] = float("inf")  # type: ignore[union-attr]
    _, is_finite = run.stepper._update(values)
    after = stage_module(run.chunks[0]).tables()
    lowered = run.stepper.scaler.scale.item()  # type: ignore[union-attr]
    return bool(is_finite), lowered, all(map(torch.equal, before, after))


def _on_two_ranks() -> tuple[list[StepResult], list[StepResult], tuple[bool, float, bool]]:
    return *_both(_DIVIDED), _with_overflowing_row(_DIVIDED)


def test_two_ranks_of_the_distributed_optimizer_skip_the_same_steps_as_with_whole_tables() -> None:
    for rows, whole, (is_finite, lowered, unchanged) in run_distributed(_on_two_ranks, 2):
        _compare(rows, whole)
        # An overflow of a row on one rank lowers the scale on both, and changes no table.
        assert not is_finite and unchanged
        assert lowered == _LOW.initial_loss_scale / 2


def test_an_overflow_of_a_row_alone_skips_the_step_and_lowers_the_scale() -> None:
    is_finite, lowered, unchanged = run_single(_with_overflowing_row, _SUMS)
    assert not is_finite and unchanged
    assert lowered == _LOW.initial_loss_scale / 2
