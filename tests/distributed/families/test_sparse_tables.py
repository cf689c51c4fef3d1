"""Tables that are trained by rows (--per-layer-sparse) against tables that the engine trains whole.

Losses over 50 steps, gradients, norms and statistics at every layout, bytes over data-parallel ranks, skipped steps,
frozen tables.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.per_layer.per_layer_inputs import stage_module
from megatron_ext.per_layer.sparse import row_optimizer
from megatron_ext.per_layer.sparse.row_blocks import RowBlocks
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.layout_runs import OVERLAPPED, LayoutRuns, Variant, assert_same_run, train_variant
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import (
    CONSTANT,
    GLOBAL_BATCH_SIZE,
    TINY,
    VOCAB_SIZE,
    assemble,
    synthetic_batches,
)
from megatron_ext.training.interface.family_interface import Batch, Family
from megatron_ext.training.interface.own_optimizer import bring_up_to_date, own_optimizers

MODEL = replace(TINY, num_layers=2)
ROWS = 4 * VOCAB_SIZE
# Every fourth row is used; half of the tokens share one, so that the others are rare.
TABLE = [4 * token if token % 2 else 0 for token in range(VOCAB_SIZE)]
DENSE = PerLayerConfig(
    use_per_layer_embedding=True,
    per_layer_vocab_size=ROWS,
    per_layer_hidden_size=8,
    per_layer_init_std=0.2,
    log_per_layer_stats=True,
    log_per_layer_gradients=True,
    per_layer_stats_interval=10,
)
SPARSE = replace(DENSE, per_layer_sparse=True)
SCALED = replace(
    SPARSE, per_layer_lr_scale=0.5, per_layer_weight_decay=0.3, log_per_layer_stats=False
)  # without the statistics that only rows have
NGRAMS = replace(SPARSE, per_layer_strategy="trigram_hash", log_per_layer_stats=False)
SGD = replace(SPARSE, per_layer_optimizer="sgd", per_layer_lr_scale=20.0)


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, settings: PerLayerConfig) -> None:
        self.settings = settings

    def __call__(self) -> list[Family]:
        return [
            PerLayerFamily(self.settings, VOCAB_SIZE, TABLE if self.settings.needs_table else None, eod=3)
        ]


def _variant(per_layer: PerLayerConfig, steps: int, **fields: Any) -> Variant:
    return Variant(
        make_families=_Make(per_layer), steps=steps, **{"model": MODEL, "micro_batch_size": 2, **fields}
    )


def _by(optimizer: str) -> PerLayerConfig:
    return replace(SPARSE, per_layer_optimizer=optimizer, per_layer_stats_interval=1)  # type: ignore[arg-type]


_RUNS = LayoutRuns(
    {
        "whole": _variant(DENSE, 50),
        "adam": _variant(SPARSE, 50),
        "whole, n-grams": _variant(replace(NGRAMS, per_layer_sparse=False), 10),
        "adam, n-grams": _variant(NGRAMS, 10),
        "whole, scaled": _variant(replace(SCALED, per_layer_sparse=False), 10),
        "adam, scaled": _variant(SCALED, 10),
        "whole, bf16": _variant(DENSE, 50, precision="bf16"),
        "adam, bf16": _variant(SPARSE, 50, precision="bf16"),
        # At a small learning rate: training makes rounding errors grow, by 1e5 in 50 steps at 5e-3.
        "sgd": _variant(SGD, 50, settings=replace(CONSTANT, lr=1e-3)),
        "short adam": _variant(_by("adam"), 4, model=TINY, micro_batch_size=1),
        "lazy_adam": _variant(_by("lazy_adam"), 4, model=TINY, micro_batch_size=1),
        "rowwise_adagrad": _variant(_by("rowwise_adagrad"), 4, micro_batch_size=1),
    },
    [],
    {
        "TP2": ["whole", "adam", "adam, n-grams"],
        "PP2": ["whole", "adam", "adam, n-grams"],
        "DP2": ["whole", "adam", "sgd", "adam, n-grams"],
        "TP2+SP": ["whole", "adam", "rowwise_adagrad"],
        "TP1 recomputed": ["whole", "adam"],
        "DP2 distributed optimizer": ["whole", "adam", "whole, bf16", "adam, bf16"],
        "PP2 interleaved recomputed": ["short adam", "lazy_adam"],
        OVERLAPPED: ["short adam", "rowwise_adagrad"],
        "CP2": ["short adam", "adam, n-grams"],
    },
)
_LAYOUTS = ("TP1", "TP2", "PP2", "DP2", "TP2+SP", "TP1 recomputed", "DP2 distributed optimizer")


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_adam_by_rows_has_the_losses_of_whole_tables_over_50_steps(layout: str) -> None:
    found, expected = _RUNS.at(layout, "adam"), _RUNS.at(layout, "whole")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.trace.losses == pytest.approx(theirs.trace.losses, rel=1e-5)
        assert ours.trace.grad_norms == pytest.approx(theirs.trace.grad_norms, rel=1e-3)
        of_layers = {tag: ours.trace.statistics[tag] for tag in theirs.trace.statistics}
        assert of_layers == pytest.approx(theirs.trace.statistics, rel=1e-3, abs=1e-6)
        assert ours.saved == theirs.saved
    gradients, whole = (assemble([run.trace for run in runs]) for runs in (found, expected))
    assert gradients.keys() == whole.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "DP2", "CP2"])
def test_sums_of_rows_train_by_rows_as_in_whole_tables(layout: str) -> None:
    assert_same_run(_RUNS.at(layout, "adam, n-grams"), _RUNS.single("whole, n-grams"))


def test_learning_rate_scale_and_weight_decay_of_tables_are_those_of_whole_tables() -> None:
    assert_same_run(_RUNS.at("TP1", "adam, scaled"), _RUNS.single("whole, scaled"))


@pytest.mark.parametrize("layout", ["TP1", "DP2 distributed optimizer"])
def test_bf16_by_rows_has_the_losses_of_whole_tables(layout: str) -> None:
    found, expected = (_RUNS.at(layout, f"{kind}, bf16")[0].trace for kind in ("adam", "whole"))
    # The order of the sum in the gradient norm differs, and with it what rounds to another bf16 value.
    assert found.losses == pytest.approx(expected.losses, rel=5e-3)


@pytest.mark.parametrize(
    ("layout", "variant"), [case for case in _RUNS.cases() if _RUNS.variants[case[1]].steps == 4]
)
def test_every_optimizer_of_rows_trains_alike_at_every_layout(layout: str, variant: str) -> None:
    assert_same_run(_RUNS.at(layout, variant), _RUNS.single(variant))


def _all_rows(ids: Sequence[torch.Tensor], blocks: RowBlocks) -> tuple[torch.Tensor, list[int]]:
    return torch.arange(ROWS), [ROWS]


def _sgd_of_all_rows() -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_optimizer, "touched_rows", _all_rows)
        return train_variant(_RUNS.variants["sgd"], ParallelConfig()).trace.losses


def test_sgd_of_the_touched_rows_has_the_losses_of_sgd_of_all_rows_over_50_steps() -> None:
    expected = run_single(_sgd_of_all_rows)
    assert expected[-1] < expected[0]
    assert _RUNS.single("sgd").trace.losses == pytest.approx(expected, rel=1e-6)
    assert _RUNS.at("DP2", "sgd")[0].trace.losses == pytest.approx(expected, rel=1e-6)


def _run_settings(settings: PerLayerConfig, **fields: Any) -> RunSettings:
    return RunSettings(
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(),
        model=MODEL,
        make_families=_Make(settings),
        **fields,
    )


def _table_gradients(settings: PerLayerConfig, bf16: bool) -> list[torch.Tensor]:
    """The tables' gradients of one step before clipping, whose factor depends on the order of a sum."""
    run = TinyRun(_run_settings(settings, precision="bf16" if bf16 else "fp32"))
    run.stepper.forward_backward(run._batches)
    run.stepper.optimizer.prepare_grads()
    found = []
    for layer in stage_module(run.chunks[0]).weights():
        table = layer.embedding.weight
        gradient: torch.Tensor = table.main_grad.clone()  # type: ignore[attr-defined]
        rows = getattr(table, "gradient_rows", None)
        found.append(gradient if rows is None else torch.zeros(table.shape).index_copy_(0, rows, gradient))
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_of_four_micro_batches_are_those_of_whole_tables_to_the_bit(bf16: bool) -> None:
    whole, rows = (run_single(_table_gradients, settings, bf16) for settings in (DENSE, SPARSE))
    assert len(whole) == 2
    for of_table, of_rows in zip(whole, rows, strict=True):
        assert of_table.abs().max() > 0
        assert torch.equal(of_table, of_rows)


def _bytes_over_data_parallel_ranks(settings: PerLayerConfig, parallel: ParallelConfig) -> dict[str, int]:
    """Bytes of gradients and ids that a step sends over data-parallel ranks, and the rows that it touches."""
    run = TinyRun(replace(_run_settings(settings), parallel=parallel))
    run.train(1)
    sent = {"reduced": 0, "gathered": 0}
    group = stage_module(run.chunks[0]).groups.dp_cp
    ranks = dist.get_process_group_ranks(group)
    with pytest.MonkeyPatch.context() as patch:
        for name, kind, place in (
            ("all_reduce", "reduced", 0),
            ("reduce_scatter_tensor", "reduced", 1),
            ("_reduce_scatter_base", "reduced", 1),
            ("all_gather", "gathered", 1),
        ):
            patch.setattr(dist, name, _counted(getattr(dist, name), sent, kind, place, ranks))
        run.train(1)
    tables = stage_module(run.chunks[0]).tables()
    rows = getattr(tables[0], "gradient_rows", torch.empty(0)).numel()
    return {**sent, "rows": rows, "tables": sum(table.numel() for table in tables)}


def _counted(
    function: Callable[..., Any], sent: dict[str, int], kind: str, place: int, ranks: list[int]
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        over = dist.get_process_group_ranks(group) if group is not None else ranks
        if over == ranks and len(ranks) > 1:
            tensor = args[place]
            sent[kind] += tensor.numel() * tensor.element_size()
        return function(*args, **kwargs)

    return call


def test_a_step_reduces_the_touched_rows_only() -> None:
    whole, rows = (
        run_distributed(_bytes_over_data_parallel_ranks, 2, settings, ParallelConfig())[0]
        for settings in (DENSE, SPARSE)
    )
    assert 0 < rows["rows"] < 50 < ROWS
    columns, layers = 8, 2
    assert rows["tables"] == layers * ROWS * columns
    # Of the tables nothing but [L, n, p] in fp32 is reduced; the rest of the model and the losses are the same.
    assert whole["reduced"] - rows["reduced"] == 4 * (rows["tables"] - layers * rows["rows"] * columns)
    # Beside that, this rank's ids of 8 bytes.
    assert rows["gathered"] - whole["gathered"] == 8 * MODEL.seq_length * GLOBAL_BATCH_SIZE // 2


def _with_nan(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        batch["loss_mask"][0, 3] = float("nan")
        yield batch


def _with_skipped_step(name: str, skips: bool) -> tuple[list[float], list[torch.Tensor], int]:
    """Six steps, and after the third of them one that is not finite: losses, tables, and the number of updates."""
    run = TinyRun(_run_settings(replace(SPARSE, per_layer_optimizer=name)))  # type: ignore[arg-type]
    losses = run.train(3)
    if skips:
        assert run.stepper.train(_with_nan(synthetic_batches(MODEL.seq_length)), 4).skipped
    losses += run.train(3)
    bring_up_to_date(run.optimizer)
    tables = [table.detach().clone() for table in stage_module(run.chunks[0]).tables()]
    (rows,) = own_optimizers(run.optimizer)
    return losses, tables, rows.step_count()


@pytest.mark.parametrize("name", ["adam", "lazy_adam", "rowwise_adagrad", "sgd"])
def test_a_step_that_is_not_finite_leaves_no_trace_in_tables_and_later_steps(name: str) -> None:
    (plain, expected, _), (losses, found, count) = (
        run_single(_with_skipped_step, name, skips) for skips in (False, True)
    )
    assert count == 6
    assert losses == pytest.approx(plain, rel=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def _tables_after(settings: PerLayerConfig) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    run = TinyRun(_run_settings(settings))
    before = [table.detach().clone() for table in stage_module(run.chunks[0]).tables()]
    run.train(3)
    bring_up_to_date(run.optimizer)
    after = [table.detach().clone() for table in stage_module(run.chunks[0]).tables()]
    return before, after, len(run.optimizer.chained_optimizers)


def test_frozen_tables_stay_as_they_are_and_have_no_optimizer() -> None:
    before, after, parts = run_single(_tables_after, replace(SPARSE, freeze_per_layer_embedding=True))
    assert parts == 1
    assert all(map(torch.equal, before, after))


def test_lazy_adam_changes_the_touched_rows_only_and_adam_decays_all() -> None:
    before, after, _ = run_single(_tables_after, replace(SPARSE, per_layer_optimizer="lazy_adam"))
    changed = (before[0] != after[0]).any(1)
    assert 0 < changed.sum() < ROWS / 4
    assert not changed[1::4].any()  # rows that no token uses
    before, after, _ = run_single(_tables_after, SPARSE)
    assert ((before[0] != after[0]).any(1)).all()
    # The rates of the schedule's first steps are 0, 5e-3 and 1e-2, its weight decay 0.1.
    expected = before[0][1::4] * (1 - 5e-3 * 0.1) * (1 - 1e-2 * 0.1)
    torch.testing.assert_close(after[0][1::4], expected, rtol=1e-6, atol=0)


def _evaluated(settings: PerLayerConfig) -> list[float]:
    run = TinyRun(_run_settings(settings))
    found = []
    for _ in range(2):
        run.train(5)
        found.append(run.stepper.evaluate(lambda: synthetic_batches(MODEL.seq_length), 2)["lm loss"])
    return found


def test_an_evaluation_reads_tables_that_are_up_to_date() -> None:
    whole, rows = (run_single(_evaluated, settings) for settings in (DENSE, SPARSE))
    assert rows == pytest.approx(whole, rel=1e-6)
