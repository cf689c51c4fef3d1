"""On a GPU the host reads nothing of what rows have missed; rows then move as they do where it reads."""

from collections.abc import Iterator
from typing import cast

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.per_layer.per_layer_inputs import stage_module
from megatron_ext.per_layer.sparse.row_optimizer import RowOptimizer
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, synthetic_batches
from megatron_ext.training.interface.family_interface import Batch
from megatron_ext.training.interface.own_optimizer import bring_up_to_date, own_optimizers


def _with_nan(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        batch["loss_mask"][0, 3] = float("nan")
        yield batch


def _trained(host_reads: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of eleven steps and one that is skipped, and the tables after them."""
    settings = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_vocab_size=VOCAB_SIZE,
        per_layer_hidden_size=8,
        per_layer_sparse=True,
    )
    family = PerLayerFamily(settings, VOCAB_SIZE, list(range(VOCAB_SIZE)))
    run = TinyRun(
        RunSettings(parallel=ParallelConfig(), checkpoint=CheckpointConfig(), make_families=lambda: [family])
    )
    (own,) = own_optimizers(run.optimizer)
    cast(RowOptimizer, own)._host_reads = host_reads
    losses = run.train(5)
    assert run.stepper.train(_with_nan(synthetic_batches(TINY.seq_length)), 6).skipped
    losses += run.train(6)
    bring_up_to_date(run.optimizer)
    assert own.step_count() == 11
    return losses, [table.detach().clone() for table in stage_module(run.chunks[0]).tables()]


def test_rows_move_alike_whether_or_not_the_host_reads_what_they_have_missed() -> None:
    (losses, tables), (expected, wanted) = (run_single(_trained, reads) for reads in (False, True))
    assert losses == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(tables, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
