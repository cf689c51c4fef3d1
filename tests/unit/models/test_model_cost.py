"""Parameters and FLOPs from the configuration, against the built model, torch's counter and published formulas."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.model_cost import (
    ModelCost,
    hardware_flops_per_token,
    model_cost,
    training_flops_per_token,
)
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

VOCAB, SEQUENCE, BATCH = 300, 16, 2
BASE = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    seq_length=SEQUENCE,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
VARIANTS = {
    "base": BASE,
    "untied": replace(BASE, untie_embeddings_and_output_weights=True),
    "grouped queries": replace(BASE, num_query_groups=2),
    "wide heads": replace(BASE, kv_channels=24, num_query_groups=1),
    "no biases": replace(BASE, disable_bias_linear=True),
    "qkv bias only": replace(BASE, disable_bias_linear=True, add_qkv_bias=True),
    "attention's biases only": replace(
        BASE, disable_bias_linear=True, add_qkv_bias=True, add_attention_output_bias=True
    ),
    "MLP's biases only": replace(BASE, disable_bias_linear=True, add_mlp_bias=True),
    "norms on queries and keys": replace(BASE, qk_layernorm=True),
    "SwiGLU": replace(BASE, swiglu=True, disable_bias_linear=True),
    "SwiGLU with biases": replace(BASE, swiglu=True),
    "GeGLU": replace(BASE, geglu=True, disable_bias_linear=True),
    "sandwich norms": replace(BASE, sandwich_norm=True, apply_layernorm_1p=True),
    "sandwich LayerNorms": replace(BASE, sandwich_norm=True, normalization="LayerNorm"),
    "AltUp": replace(BASE, altup_streams=3),
    "Laurel": replace(BASE, laurel_rank=5, normalization="LayerNorm"),
    "sparse gates": replace(BASE, geglu=True, disable_bias_linear=True, mlp_activation_sparsity="0.9"),
    "narrow MLP": replace(BASE, ffn_hidden_size=96),
    "widths per layer": replace(BASE, ffn_hidden_sizes="[96]+[160]*3", swiglu=True, disable_bias_linear=True),
    "LayerNorm": replace(BASE, normalization="LayerNorm", qk_layernorm=True),
    "learned positions": replace(
        BASE, position_embedding_type="learned_absolute", max_position_embeddings=40
    ),
    "no positions": replace(BASE, position_embedding_type="none"),
    "vocabulary not padded": replace(BASE, make_vocab_size_divisible_by=1),
    "all at once": replace(
        BASE,
        swiglu=True,
        num_query_groups=2,
        qk_layernorm=True,
        normalization="LayerNorm",
        position_embedding_type="learned_absolute",
        untie_embeddings_and_output_weights=True,
    ),
}
WINDOWED = replace(
    BASE,
    window_size="7,0",
    window_attn_skip_freq="2",
    qk_layernorm=True,
    num_query_groups=2,
    sandwich_norm=True,
)
IN_WINDOWS = {
    "other heads without a window": replace(WINDOWED, kv_channels_full=24, num_query_groups_full=1),
    "keys that are values": replace(WINDOWED, attention_k_eq_v=True, disable_bias_linear=True),
    "shared keys": replace(WINDOWED, num_kv_shared_layers=2, kv_channels_full=32, v_layernorm=True),
    "no norms": replace(WINDOWED, num_kv_shared_layers=1, qk_layernorm=False, layer_scalar=True),
}
"""Models whose FLOPs torch does not count alike, because attention computes in blocks."""

# The engine cannot recompute an MLP with biases: it returns one beside the output, which closes a circle in autograd.
RECOMPUTED = replace(BASE, attention_backend="local", disable_bias_linear=True)
RECOMPUTE = {
    "none": ParallelConfig(),
    "uniform": ParallelConfig(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2
    ),
    "block": ParallelConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=3),
    "attention": ParallelConfig(recompute_granularity="selective"),
    "MLP": ParallelConfig(recompute_granularity="selective", recompute_modules=("mlp",)),
}


def built_parameters() -> dict[str, int]:
    initialize(ParallelConfig(), 1)
    counts = {}
    for name, model in {**VARIANTS, **IN_WINDOWS}.items():
        (chunk,) = build_model(model, ParallelConfig(), vocab_size=VOCAB, seed=1)
        counts[name] = sum(parameter.numel() for parameter in chunk.parameters())
    return counts


def counted_flops() -> dict[tuple[str, str], tuple[int, int]]:
    """(variant, recompute) -> torch's count of forward, and of forward and backward."""
    initialize(ParallelConfig(), 1)
    local = {name: (replace(model, attention_backend="local"), "none") for name, model in VARIANTS.items()}
    again = {f"recompute {name}": (RECOMPUTED, name) for name in RECOMPUTE}
    fused = {"fused attention": (BASE, "none")}
    return {
        (name, recompute): _count(model, RECOMPUTE[recompute])
        for name, (model, recompute) in {**local, **again, **fused}.items()
    }


def _count(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    (chunk,) = build_model(model, parallel, vocab_size=VOCAB, seed=1)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    mask = None
    if model.attention_backend == "local":
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    chunk.train()
    with _counter() as counter:
        loss = chunk(tokens, positions, mask, labels=tokens).mean()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def _counter() -> FlopCounterMode:
    def fused_on_cpu(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        # grouped keys and values reach the kernel as they are
        heads = query[1]
        return sdpa_flop_count(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: fused_on_cpu})


@functools.cache
def parameters() -> dict[str, int]:
    return run_single(built_parameters)


@functools.cache
def flops() -> dict[tuple[str, str], tuple[int, int]]:
    return run_single(counted_flops)


@pytest.mark.parametrize("name", [*VARIANTS, *IN_WINDOWS])
def test_parameters_equal_those_of_the_built_model(name: str) -> None:
    assert model_cost({**VARIANTS, **IN_WINDOWS}[name], VOCAB).parameters == parameters()[name]


def test_a_layer_that_uses_keys_of_another_computes_none() -> None:
    model, shared = (replace(BASE, num_query_groups=2, num_kv_shared_layers=number) for number in (0, 3))
    less = (
        model_cost(model, VOCAB).forward_flops_per_token - model_cost(shared, VOCAB).forward_flops_per_token
    )
    assert less == 3 * 2 * BASE.hidden_size * 2 * 2 * BASE.resolved_kv_channels


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_of_forward_and_backward_equal_torchs_count(name: str) -> None:
    cost = model_cost(VARIANTS[name], VOCAB)
    forward, both = flops()[name, "none"]
    assert cost.forward_flops_per_token * BATCH * SEQUENCE == forward
    assert training_flops_per_token([cost]) * BATCH * SEQUENCE == both


def test_forward_flops_with_fused_attention_equal_torchs_count() -> None:
    forward, _ = flops()["fused attention", "none"]
    assert model_cost(BASE, VOCAB).forward_flops_per_token * BATCH * SEQUENCE == forward


@pytest.mark.parametrize("name", RECOMPUTE)
def test_hardware_flops_equal_torchs_count_with_recomputation(name: str) -> None:
    cost = model_cost(RECOMPUTED, VOCAB)
    _, both = flops()[f"recompute {name}", name]
    assert hardware_flops_per_token(RECOMPUTED, RECOMPUTE[name], [cost]) * BATCH * SEQUENCE == both


def test_block_recompute_counts_every_virtual_stage() -> None:
    parallel = replace(
        RECOMPUTE["block"],
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=2,
        recompute_num_layers=1,
    )
    model = replace(BASE, num_layers=8)
    cost = model_cost(model, VOCAB)
    layer = (cost.forward_flops_per_token - model_cost(BASE, VOCAB).forward_flops_per_token) / 4
    extra = hardware_flops_per_token(model, parallel, [cost]) - training_flops_per_token([cost])
    assert extra == pytest.approx(4 * layer)


def test_gpt3_has_the_parameters_and_flops_of_the_published_formulas() -> None:
    """arXiv 2104.04473: equation 2 and, for a step with full recompute, equation 3."""
    layers, hidden, sequence, vocab = 96, 12288, 2048, 51200
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=96,
        seq_length=sequence,
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
    )
    cost = model_cost(model, vocab)
    published = (
        12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + (vocab + sequence) / (12 * layers * hidden))
    )
    assert cost.parameters == pytest.approx(published, rel=1e-6)  # the formula leaves out the final norm
    published = 96 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (16 * layers * hidden))
    parallel = replace(RECOMPUTE["uniform"], recompute_num_layers=1)
    assert hardware_flops_per_token(model, parallel, [cost]) == pytest.approx(published, rel=1e-9)


def test_a_familys_cost_adds_up() -> None:
    base, family = ModelCost(10, 100.0), ModelCost(5, 20.0)
    assert training_flops_per_token([base, family]) == 360.0
    uniform = hardware_flops_per_token(BASE, RECOMPUTE["uniform"], [model_cost(BASE, VOCAB), family])
    alone = hardware_flops_per_token(BASE, RECOMPUTE["uniform"], [model_cost(BASE, VOCAB)])
    assert uniform - alone == pytest.approx(4 * 20.0)


def test_a_window_counts_its_keys_only_and_a_pattern_the_mean_over_the_layers() -> None:
    size = BASE.num_attention_heads * BASE.resolved_kv_channels
    for window, skip, keys in (
        ("7,0", None, 8),
        ("7,0", "2", (8 + SEQUENCE) / 2),
        ("9999,0", None, SEQUENCE),
    ):
        model = replace(BASE, window_size=window, window_attn_skip_freq=skip)
        less = (
            model_cost(BASE, VOCAB).forward_flops_per_token - model_cost(model, VOCAB).forward_flops_per_token
        )
        assert less == BASE.num_layers * 4 * (SEQUENCE - keys) * size
