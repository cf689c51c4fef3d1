"""PLE at every parallel layout: losses, gradient norms, first gradients, statistics, checkpoint keys."""

from dataclasses import replace

import pytest

from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.layout_runs import OVERLAPPED, LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.tiny_training import LAYOUTS, TINY, VOCAB_SIZE, assemble
from megatron_ext.training.interface.family_interface import Family

ROWS = 24
TABLE = [token % ROWS for token in range(VOCAB_SIZE)]
DOCUMENT_003 = PerLayerConfig(
    use_per_layer_embedding=True,
    per_layer_vocab_size=ROWS,
    per_layer_hidden_size=8,
    log_per_layer_stats=True,
    log_per_layer_gradients=True,
    per_layer_stats_interval=1,
)
VARIANTS = {
    "scaled_add": DOCUMENT_003,
    "concat": replace(DOCUMENT_003, per_layer_combination_method="concat", per_layer_position="after_mlp"),
    "gated": replace(DOCUMENT_003, per_layer_combination_method="gated", per_layer_lr_scale=0.5),
    "gemma4": replace(DOCUMENT_003, per_layer_preset="gemma4", per_layer_vocab_size=VOCAB_SIZE),
    "trigram_hash": replace(DOCUMENT_003, per_layer_strategy="trigram_hash"),
}


class _Make:
    """Makes the families of a run; travels to the processes by pickle."""

    def __init__(self, variant: str) -> None:
        self.variant = variant

    def __call__(self) -> list[Family]:
        settings = VARIANTS[self.variant]
        return [PerLayerFamily(settings, VOCAB_SIZE, TABLE if settings.needs_table else None, eod=3)]


RUNS = LayoutRuns(
    {name: Variant(make_families=_Make(name)) for name in VARIANTS},
    [
        *LAYOUTS,
        OVERLAPPED,
        *("TP2+SP recomputed", "PP2 interleaved recomputed"),
        *("CP2", "TP2+SPxCP2", "PP2xCP2 recomputed", "DP2xCP2 distributed optimizer"),
    ],
)
BF16 = LayoutRuns(
    {name: Variant(make_families=_Make(name), precision="bf16") for name in VARIANTS}, ["TP2+SP"]
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_trains_logs_and_saves_as_the_single_process_does(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_and_every_layer_its_statistics(variant: str) -> None:
    run = RUNS.single(variant)
    gradients = assemble([run.trace])
    per_layer = [
        key
        for key in gradients
        if key.startswith("per_layer.") or ".before_layer." in key or ".after_mlp." in key
    ]
    weights = 5 if VARIANTS[variant].per_layer_combination_method == "scaled_add" else 6
    assert len(per_layer) == TINY.num_layers * weights + 1
    assert all(float(gradients[key].abs().max()) > 0 for key in per_layer)
    layers = {tag.rpartition("/")[2] for tag in run.trace.statistics}
    assert layers == {f"layer_{number:02d}" for number in range(TINY.num_layers)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_layer_owns_at_stage_level_is_saved_under_the_layers_global_number(variant: str) -> None:
    saved = dict(RUNS.single(variant).saved)
    for number in range(TINY.num_layers):
        rows = VARIANTS[variant].rows(VOCAB_SIZE)
        assert saved[f"per_layer.layers.{number}.embedding.weight"] == (rows, 8)
        assert saved[f"per_layer.layers.{number}.context_projection.weight"] == (8, TINY.hidden_size)
    assert saved["per_layer.norm.weight"] == (8,)


@pytest.mark.parametrize(("layout", "variant"), BF16.cases())
def test_bf16_follows_fp32(layout: str, variant: str) -> None:
    rounded, exact = BF16.at(layout, variant)[0], RUNS.single(variant)
    assert rounded.trace.losses == pytest.approx(exact.trace.losses, rel=1e-2)
