"""A model of one's own with Gemma 3n's streams, low-rank path and sparse gates trains alike at every layout."""

from dataclasses import replace

import pytest
import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.testing.layout_runs import LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, assemble
from megatron_ext.training.interface.family_interface import Family

GEMMA3N = replace(
    TINY,
    init_method_std=0.05,
    ffn_hidden_size=None,
    ffn_hidden_sizes="[96]*2+[64]*2",
    swiglu=False,
    geglu=True,
    sandwich_norm=True,
    qk_layernorm=True,
    softmax_scale=1.0,
    embedding_multiplier=32**0.5,
    window_size="5,0",
    window_attn_skip_freq="2",
    rotary_base_local=100.0,
    altup_streams=4,
    altup_coef_clip=0.08,
    laurel_rank=6,
    mlp_activation_sparsity="[0.7]+[0.5]+[0]+[0.3]",
    v_layernorm=True,
    num_kv_shared_layers=2,
)


def per_layer() -> list[Family]:
    """PLE as Gemma 3n has it, with tables of fewer rows than the vocabulary."""
    settings = PerLayerConfig(
        use_per_layer_embedding=True,
        per_layer_preset="gemma3n",
        per_layer_hidden_size=8,
        per_layer_vocab_size=VOCAB_SIZE - 10,
    )
    return [PerLayerFamily(settings, VOCAB_SIZE)]


VARIANTS = {
    "all with PLE": Variant(model=GEMMA3N, make_families=per_layer),
    "two streams": Variant(model=replace(TINY, altup_streams=2, hidden_dropout=0.0)),
    "Laurel": Variant(model=replace(TINY, laurel_rank=3, normalization="LayerNorm")),
    "sparse SwiGLU": Variant(model=replace(TINY, mlp_activation_sparsity="0.8")),
}
RUNS = LayoutRuns(
    VARIANTS,
    ["TP2", "TP2+SP", "PP2", "PP2 interleaved", "CP2", "TP1 recomputed", "PP2 interleaved recomputed"],
    {
        "TP2xPP2": ["all with PLE"],
        "TP2+SPxCP2": ["all with PLE"],
        "DP2 overlapped distributed optimizer": ["all with PLE", "two streams"],
        "TP1 MLP recomputed": ["all with PLE"],
    },
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_has_the_losses_and_gradients_of_a_single_process(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant), norms=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_gets_a_gradient(variant: str) -> None:
    gradients = assemble([RUNS.single(variant).trace])
    assert all(torch.linalg.norm(gradient) > 0 for gradient in gradients.values())
    names = {name.split(".")[-2] for name in gradients}
    assert ("altup" in names) == (variant in ("all with PLE", "two streams"))
    assert ("laurel" in names) == (variant in ("all with PLE", "Laurel"))


@pytest.mark.parametrize(
    ("flag", "model"),
    [
        ("--altup-streams", replace(TINY, altup_streams=2)),
        ("--laurel-rank", replace(TINY, laurel_rank=3)),
    ],
)
def test_npt_refuses_streams_and_paths_beside_the_attention_by_name(flag: str, model: ModelConfig) -> None:
    family = NPTFamily(NPTModuleConfig(npt_layers="all", np_target="gate+up+down", np_rank=4))
    with pytest.raises(ValueError, match=f"{flag}: not supported by the model family npt"):
        family.check(model, ParallelConfig())
