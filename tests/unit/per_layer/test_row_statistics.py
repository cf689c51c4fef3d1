"""Statistics of tables that are trained by rows, against the ids of the steps."""

import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.per_layer.per_layer_charts import PER_LAYER_CHARTS
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.reports.scalar_charts import chart_of
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import GLOBAL_BATCH_SIZE, TINY, VOCAB_SIZE, synthetic_batches

_ROWS, _WIDTH = 4 * VOCAB_SIZE, 8


def _values() -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """The different tokens of three steps; the values of the second and the third."""
    settings = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_vocab_size=_ROWS,
        per_layer_hidden_size=_WIDTH,
        per_layer_sparse=True,
        log_per_layer_stats=True,
    )
    family = PerLayerFamily(settings, VOCAB_SIZE, [4 * token for token in range(VOCAB_SIZE)])
    run = TinyRun(
        RunSettings(parallel=ParallelConfig(), checkpoint=CheckpointConfig(), make_families=lambda: [family])
    )
    family.statistics_interval = None
    run.train(1)
    family.statistics_interval = 1
    values = [run.stepper.train(run._batches, iteration).statistics for iteration in (2, 3)]
    batches = synthetic_batches(TINY.seq_length)
    tokens = [[next(batches)["tokens"] for _ in range(GLOBAL_BATCH_SIZE)] for _ in range(3)]
    return [torch.cat(of_step).unique() for of_step in tokens], values


def test_rows_of_a_step_and_of_all_steps_are_those_of_the_tokens() -> None:
    tokens, found = run_single(_values)
    for steps, values in enumerate(found, start=2):
        touched, ever = len(tokens[steps - 1]), len(torch.cat(tokens[:steps]).unique())
        assert 1 < touched < VOCAB_SIZE
        of_rows = {tag: value for tag, value in values.items() if "layer_" not in tag}
        assert of_rows == {
            "per-layer/rows-touched": touched,
            "per-layer/rows-ever-touched-share": ever / _ROWS,
            "per-layer/row-gradients-mib": 4 * touched * TINY.num_layers * _WIDTH / 2**20,
        }
        assert {chart_of(tag, PER_LAYER_CHARTS).section for tag in of_rows} == {"Per-layer embedding"}
    assert found[1]["per-layer/rows-ever-touched-share"] >= found[0]["per-layer/rows-ever-touched-share"]
