"""The memory estimate, against the parameters and saved tensors of the built model and the engine's schedule."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.models.build_model import build_model
from megatron_ext.models.costs.activation_memory import (
    ParallelLayout,
    layer_activation_bytes,
    shared_key_bytes,
    stage_activation_bytes,
)
from megatron_ext.models.costs.memory_estimate import estimate_memory
from megatron_ext.models.costs.model_cost import layer_parameters
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

VOCAB, SEQUENCE, BATCH = 300, 32, 2
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=SEQUENCE,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
UNTIED = replace(
    MODEL,
    untie_embeddings_and_output_weights=True,
    swiglu=True,
    qk_layernorm=True,
    normalization="LayerNorm",
    position_embedding_type="learned_absolute",
)
SELECTIVE = ParallelConfig(recompute_granularity="selective")
MLP = ParallelConfig(recompute_granularity="selective", recompute_modules=("core_attn", "mlp"))
FULL = ParallelConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LOCAL = replace(MODEL, attention_backend="local")
SAVED = {
    "fused": (MODEL, ParallelConfig(), False),
    "fused bf16": (MODEL, ParallelConfig(), True),
    "no positions": (replace(MODEL, position_embedding_type="none"), ParallelConfig(), False),
    "local": (LOCAL, ParallelConfig(), False),
    "local bf16": (LOCAL, ParallelConfig(), True),
    "local, attention again": (LOCAL, SELECTIVE, False),
    "local, attention and MLP again": (LOCAL, MLP, True),
    "SwiGLU": (replace(MODEL, swiglu=True, disable_bias_linear=True), ParallelConfig(), False),
    "norm on queries and keys": (replace(MODEL, qk_layernorm=True), ParallelConfig(), True),
    "LayerNorm": (replace(MODEL, normalization="LayerNorm"), ParallelConfig(), False),
    "GeGLU": (replace(MODEL, geglu=True, disable_bias_linear=True), ParallelConfig(), False),
    "sandwich norms": (replace(MODEL, sandwich_norm=True), ParallelConfig(), False),
    "sandwich norms of zero-centered weights": (
        replace(MODEL, sandwich_norm=True, apply_layernorm_1p=True, disable_bias_linear=True),
        ParallelConfig(),
        True,
    ),
    "AltUp": (replace(MODEL, altup_streams=4), ParallelConfig(), False),
    "Laurel": (replace(MODEL, laurel_rank=8), ParallelConfig(), True),
    "sparse gates": (
        replace(MODEL, geglu=True, disable_bias_linear=True, mlp_activation_sparsity="0.9"),
        ParallelConfig(),
        True,
    ),
    "norms on values": (replace(MODEL, v_layernorm=True, qk_layernorm=True), ParallelConfig(), False),
    "norms on values alone": (replace(MODEL, v_layernorm=True), ParallelConfig(), True),
    "norms on values in a window": (
        replace(MODEL, num_query_groups=4, v_layernorm=True, qk_layernorm=True, window_size="7,0"),
        ParallelConfig(),
        True,
    ),
    # With grouped queries, a GPU would keep the keys of every block once for every query head.
    "sliding window": (replace(MODEL, num_query_groups=4, window_size="7,0"), ParallelConfig(), False),
    "window of the whole sequence": (replace(MODEL, window_size="31,0"), ParallelConfig(), False),
}


def layout_of(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    micro_batches: int = 8,
    copies: int = 1,
    precision: Precision = "fp32",
) -> ParallelLayout:
    return ParallelLayout(
        model=model,
        parallel=parallel,
        vocab_size=VOCAB,
        micro_batch_size=BATCH,
        num_microbatches=micro_batches,
        data_parallel_size=copies,
        precision=precision,
    )


def saved_bytes_of_all() -> dict[str, tuple[float, float]]:
    """Bytes that autograd keeps: for a layer more, and for a layer more under full recompute."""
    initialize(ParallelConfig(), 1)
    result = {}
    for name, (model, parallel, bf16) in SAVED.items():
        layer = saved_bytes(replace(model, num_layers=2), parallel, bf16)
        layer -= saved_bytes(replace(model, num_layers=1), parallel, bf16)
        full = saved_bytes(replace(model, num_layers=2), FULL, bf16)
        full -= saved_bytes(replace(model, num_layers=1), FULL, bf16)
        result[name] = (layer, full)
    return result


def saved_bytes(model: ModelConfig, parallel: ParallelConfig, bf16: bool) -> float:
    """Bytes that autograd keeps for a micro-batch."""
    length = SEQUENCE // parallel.context_parallel_size
    (chunk,) = build_model(model, parallel, vocab_size=VOCAB, seed=1, precision="bf16" if bf16 else "fp32")
    chunk.train()
    owned = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, VOCAB, (BATCH, length))
    positions = torch.arange(length).expand(BATCH, length)
    mask = None
    if model.attention_backend == "local":
        mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = chunk(tokens, positions, mask, labels=tokens)
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@functools.cache
def saved() -> dict[str, tuple[float, float]]:
    return run_single(saved_bytes_of_all)


@pytest.mark.parametrize("name", SAVED)
def test_activations_of_a_layer_are_what_autograd_keeps(name: str) -> None:
    model, parallel, bf16 = SAVED[name]
    estimate = layer_activation_bytes(layout_of(model, parallel, precision="bf16" if bf16 else "fp32"))
    # The estimate leaves out what is small in a real model: rotary tables, one value a row of norms and softmax.
    assert estimate == pytest.approx(saved()[name][0], rel=0.07)


SHARED = {
    "shared keys": (MODEL, False),
    "normalized shared keys": (replace(MODEL, qk_layernorm=True, v_layernorm=True), True),
    "shared keys in a window": (
        replace(MODEL, num_query_groups=4, window_size="7,0", qk_layernorm=True),
        False,
    ),
}


def saved_with_shared_keys() -> dict[str, list[float]]:
    """Bytes that autograd keeps for two layers, for two of which the second uses the first's keys, and for one more."""
    initialize(ParallelConfig(), 1)
    return {
        name: [
            saved_bytes(
                replace(model, num_layers=layers, num_kv_shared_layers=shared), ParallelConfig(), bf16
            )
            for layers, shared in ((2, 0), (2, 1), (3, 2))
        ]
        for name, (model, bf16) in SHARED.items()
    }


def test_a_layer_that_uses_keys_of_another_keeps_what_the_estimate_says() -> None:
    for name, found in run_single(saved_with_shared_keys).items():
        model, bf16 = SHARED[name]
        layouts = [
            layout_of(
                replace(model, num_layers=3, num_kv_shared_layers=shared),
                ParallelConfig(),
                precision="bf16" if bf16 else "fp32",
            )
            for shared in (0, 2)
        ]
        own, user = (layer_activation_bytes(layout, layer=2) for layout in layouts)
        assert user < own
        assert user == pytest.approx(found[2] - found[1], rel=0.07), name
        shared = shared_key_bytes(layouts[1], 0)
        assert shared == 2 * 2 * (model.num_query_groups or 0) * 16 * SEQUENCE * BATCH * (2 if bf16 else 4)
        # Attention in blocks copies keys and values, and then keeps nothing of the stream.
        assert found[1] - found[0] + own - user <= shared, name


@pytest.mark.parametrize("name", SAVED)
def test_under_full_recompute_a_layer_keeps_its_input(name: str) -> None:
    model, _, bf16 = SAVED[name]
    more = stage_activation_bytes(
        layout_of(replace(model, num_layers=2), FULL, precision="bf16" if bf16 else "fp32"), 0
    )
    more -= stage_activation_bytes(
        layout_of(replace(model, num_layers=1), FULL, precision="bf16" if bf16 else "fp32"), 0
    )
    assert more == saved()[name][1]


@pytest.mark.parametrize(("stages", "chunks"), [(4, 1), (4, 2), (2, 3)])
@pytest.mark.parametrize("micro_batches", [2, 12])
def test_chunks_in_flight_are_those_of_the_engines_schedule(
    stages: int, chunks: int, micro_batches: int
) -> None:
    model = replace(MODEL, num_layers=stages * chunks, position_embedding_type="none")
    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages,
        num_layers_per_virtual_pipeline_stage=1 if chunks > 1 else None,
    )
    layout = layout_of(model, parallel, micro_batches=micro_batches)
    for stage in range(stages - 1):  # the last one also holds the logits
        group = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        engine = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None
        )
        total, _, warmup, _ = get_pp_rank_microbatches(micro_batches, chunks, stages, p2p_communicator=engine)
        held = min(total, warmup + 1)
        assert stage_activation_bytes(layout, stage) == held * layer_activation_bytes(layout)


@pytest.mark.parametrize(
    ("bf16", "distributed", "for_each"),
    [(False, False, 16), (False, True, 8 + 8 / 4), (True, False, 18), (True, True, 6 + 12 / 4)],
)
def test_bytes_for_a_parameter_are_megatrons(bf16: bool, distributed: bool, for_each: float) -> None:
    """The table of Megatron-LM's documentation of the distributed optimizer, for four data-parallel ranks."""
    parallel = ParallelConfig(use_distributed_optimizer=distributed)
    (memory,) = estimate_memory(layout_of(MODEL, parallel, copies=4, precision="bf16" if bf16 else "fp32"))
    assert memory.kept_bytes - memory.activation_bytes == for_each * memory.parameters


def test_families_parameters_are_spread_over_tensor_ranks_and_stages() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    without = estimate_memory(layout_of(MODEL, parallel))
    with_family = estimate_memory(layout_of(MODEL, parallel), family_parameters=4000)
    differences = [b.parameters - a.parameters for a, b in zip(without, with_family, strict=True)]
    assert differences == [1000, 1000]


def test_layers_that_train_are_found_on_the_stages_that_hold_them() -> None:
    """Two stages of two chunks each hold layers 0, 1, 4, 5 and 2, 3, 6, 7."""
    parallel = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    work = StepWork(
        layers=(Use.FORWARD,) * 5 + (Use.TRAINED, Use.GRADIENT, Use.GRADIENT),
        head=Use.GRADIENT,
        trains_embedding=False,
    )
    model = replace(MODEL, num_layers=8)
    everything = estimate_memory(layout_of(model, parallel))
    frozen = estimate_memory(replace(layout_of(model, parallel), work=work))
    assert [stage.trained_parameters for stage in frozen] == [layer_parameters(model), 0]
    assert [stage.parameters for stage in frozen] == [stage.trained_parameters for stage in everything]
    assert frozen[0].activation_bytes == everything[0].activation_bytes / 4
