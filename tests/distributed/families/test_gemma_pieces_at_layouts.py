"""A model of one's own with parts of Gemma 3 or 4, OLMo 2, Granite and SmolLM3 trains alike at every layout."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.conversion import convert
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.layout_runs import UNEVEN, LayoutRuns, Variant, assert_same_run
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY, VOCAB_SIZE, assemble
from megatron_ext.training.interface.family_interface import Family
from tests.unit.progressive.progressive_helpers import MakeAdapted

GEMMA = replace(
    TINY,
    init_method_std=0.1,
    swiglu=False,
    geglu=True,
    apply_layernorm_1p=True,
    sandwich_norm=True,
    qk_layernorm=True,
    softmax_scale=0.4,
    embedding_multiplier=32**0.5,
    final_logit_softcapping=4.0,
    window_size="5,0",
    window_attn_skip_freq="2",
    rotary_base_local=100.0,
)
GEMMA4 = replace(
    GEMMA,
    window_attn_skip_freq="2",
    ffn_hidden_size=None,
    ffn_hidden_sizes="[48]*2+[96]*2",
    kv_channels_full=16,
    num_query_groups_full=1,
    num_kv_shared_layers=2,
    v_layernorm=True,
)
OTHERS = replace(
    TINY,
    init_method_std=0.1,
    apply_layernorm_1p=True,
    post_norm=True,
    qk_projection_norm=True,
    embedding_multiplier=3.0,
    residual_multiplier=0.4,
    logit_divisor=0.3,
    no_rope_freq="2",
    use_rope_scaling=True,
    rope_scaling_type="yarn",
    rope_scaling_factor=2.0,
    rope_high_freq_factor=32.0,
    rope_original_max_position_embeddings=8,
)
"""The pieces of OLMo 2, Granite and SmolLM3."""

WITHOUT_SANDWICH = replace(GEMMA, sandwich_norm=False)
NP = NPTModuleConfig(npt_layers="all", np_target="gate+up+down", np_rank=4, np_init_scale=0.3)


def per_layer() -> list[Family]:
    """PLE as Gemma 4 has it."""
    settings = PerLayerConfig(
        use_per_layer_embedding=True, per_layer_preset="gemma4", per_layer_hidden_size=8
    )
    return [PerLayerFamily(settings, VOCAB_SIZE)]


def low_rank() -> list[Family]:
    """NPT with a frozen base."""
    return [NPTFamily(replace(NP, np_form="low_rank"))]


VARIANTS = {
    "base model": Variant(model=GEMMA),
    "LayerNorm": Variant(model=replace(GEMMA, normalization="LayerNorm")),
    "PLE": Variant(model=GEMMA, make_families=per_layer),
    "Gemma 4's layers": Variant(model=GEMMA4),
    "keys that are values": Variant(
        model=replace(GEMMA4, attention_k_eq_v=True, num_query_groups_full=2, num_kv_shared_layers=1)
    ),
    "one head of keys that are values": Variant(model=replace(GEMMA4, attention_k_eq_v=True)),
    "Gemma 4's layers with PLE": Variant(model=GEMMA4, make_families=per_layer),
    "other norms and multipliers with PLE": Variant(model=OTHERS, make_families=per_layer),
    "NPT, low_rank": Variant(model=WITHOUT_SANDWICH, make_families=low_rank),
    "adapters": Variant(
        model=replace(GEMMA, untie_embeddings_and_output_weights=True), make_families=MakeAdapted()
    ),
}
RUNS = LayoutRuns(
    VARIANTS,
    ["TP2", "TP2+SP", "PP2", "PP2 interleaved", "CP2", "TP1 recomputed", "PP2 interleaved recomputed"],
    {
        "TP2+SPxCP2": ["base model", "PLE"],
        UNEVEN: ["base model", "Gemma 4's layers", "Gemma 4's layers with PLE"],
        f"{UNEVEN} recomputed": ["Gemma 4's layers with PLE"],
    },
)


@pytest.mark.parametrize(("layout", "variant"), RUNS.cases())
def test_every_layout_has_the_losses_and_gradients_of_a_single_process(layout: str, variant: str) -> None:
    assert_same_run(RUNS.at(layout, variant), RUNS.single(variant), norms=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_gets_a_gradient(variant: str) -> None:
    gradients = assemble([RUNS.single(variant).trace])
    assert all(torch.linalg.norm(gradient) > 0 for gradient in gradients.values())
    trains_base = variant not in ("NPT, low_rank", "adapters")
    has_norms_before = trains_base and "other norms" not in variant
    assert has_norms_before == any("input_layernorm" in name for name in gradients)
    assert trains_base == any("post_mlp_layernorm" in name for name in gradients)


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--sandwich-norm", {"sandwich_norm": True}),
        ("--post-norm", {"post_norm": True}),
        ("--residual-multiplier", {"residual_multiplier": 0.5}),
    ],
)
def test_npt_refuses_what_changes_the_output_of_the_mlp_by_name(flag: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{flag}: not supported by the model family npt"):
        low_rank()[0].check(replace(WITHOUT_SANDWICH, **changes), ParallelConfig())


def test_npt_refuses_to_convert_a_model_with_norms_after_the_mlp() -> None:
    assert "--sandwich-norm: not supported" in run_single(_refused_conversion)


def _refused_conversion() -> str:
    initialize(ParallelConfig(), seed=1)
    chunks = build_model(GEMMA, ParallelConfig(), vocab_size=VOCAB_SIZE, seed=1)
    with pytest.raises(ValueError, match="sandwich") as caught:
        convert(chunks, replace(NP, np_form="low_rank"))
    return str(caught.value)
