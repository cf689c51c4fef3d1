"""Models of Transformer Engine's own Python classes: which modules, weights and checkpoints they have."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.identity_op import IdentityOp

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import build_model
from megatron_ext.models.engine_config import build_transformer_config
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.models.transformer_engine import check_te
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import (
    GLOBAL_BATCH_SIZE,
    LAYOUTS,
    VOCAB_SIZE,
    train_tiny,
    with_full_recompute,
)
from megatron_ext.testing.transformer_engine.run_with_te import needs_te, run_with_te
from tests.distributed.transformer_engine.te_variants import LLAMA, VARIANTS, with_te

pytestmark = needs_te


def _build(name: str, model: ModelConfig, parallel: ParallelConfig) -> GPTModel:
    initialize(parallel, seed=1)
    extensions = [family.extension() for family in VARIANTS[name].make_families()]
    (chunk,) = build_model(
        model, parallel, vocab_size=VOCAB_SIZE, seed=1, extensions=extensions, fuses_norms=True
    )
    return chunk


def _describe(chunk: GPTModel) -> dict[str, Any]:
    """Shape, marks and values of every parameter, and what a checkpoint would name it."""
    marks = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
    parameters = {
        name: (tuple(parameter.shape), [_mark(parameter, mark) for mark in marks], parameter.detach().clone())
        for name, parameter in chunk.named_parameters()
    }
    state = chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
    tensors = {
        key: (value.key, value.local_shape, value.global_shape, value.global_offset, value.replica_id)
        for key, value in state.items()
        if isinstance(value, ShardedTensor)
    }
    return {"parameters": parameters, "tensors": tensors}


def _mark(parameter: torch.Tensor, name: str) -> Any:
    # The engine's defaults, which it gives to parameters without marks.
    defaults = {"partition_dim": -1, "partition_stride": 1}
    return getattr(parameter, name, defaults.get(name, False))


def _modules(chunk: GPTModel, layer: int) -> dict[str, str]:
    """Maps the names of a layer's norms, linear layers, core attention and activation to their classes."""
    names = ("layernorm", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    named = (*names, "core_attention", "activation_func")
    return {
        name: type(module).__name__
        for name, module in chunk.decoder.layers[layer].named_modules()
        if name.endswith(named) and not isinstance(module, IdentityOp)
    }


FUSED_GRADIENTS = "classes whose gradients are fused"


def _examine() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for layout in ("TP2", "TP2+SP"):
        for name, variant in VARIANTS.items():
            ours = _build(name, variant.model, LAYOUTS[layout])
            theirs = _build(name, with_te(variant.model), LAYOUTS[layout])
            found[f"{name} {layout}"] = _describe(ours), _describe(theirs)
            if layout == "TP2":
                found[name] = _modules(theirs, 3)
    parallel = replace(LAYOUTS["TP2"], gradient_accumulation_fusion=True)
    fused = _build("LoRA", with_te(LLAMA), parallel).modules()
    found[FUSED_GRADIENTS] = {type(m).__name__ for m in fused if getattr(m, "fuse_wgrad_accumulation", False)}
    return found


@pytest.fixture(scope="module")
def examined() -> list[dict[str, Any]]:
    return run_with_te(_examine, 2)


FUSED = {
    "input_layernorm": "NormInLinear",
    "self_attention.core_attention": "SDPAttention",
    "self_attention.linear_proj": "TERowParallelLinear",
    "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
    "pre_mlp_layernorm": "NormInLinear",
    "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
    "mlp.activation_func": "TESwiGLU",
}
GELU = {name: kind for name, kind in FUSED.items() if name != "mlp.activation_func"}
SEPARATE = FUSED | {
    "input_layernorm": "RMSNorm",
    "pre_mlp_layernorm": "RMSNorm",
    "self_attention.linear_qkv": "TEColumnParallelLinear",
    "mlp.linear_fc1": "TEColumnParallelLinear",
}
LORA = SEPARATE | {
    f"{name}": f"Adapted{kind}ParallelLinear"
    for name, kind in (
        ("self_attention.linear_qkv", "Column"),
        ("self_attention.linear_proj", "Row"),
        ("mlp.linear_fc1", "Column"),
        ("mlp.linear_fc2", "Row"),
    )
}


@pytest.mark.parametrize(
    ("name", "modules"),
    [("Llama", FUSED), ("GPT-2", GELU), ("PLE", FUSED), ("NPT", SEPARATE), ("LoRA", LORA)],
)
def test_norms_are_fused_into_linear_layers_where_no_family_reads_them(
    examined: list[dict[str, Any]], name: str, modules: dict[str, str]
) -> None:
    assert examined[0][name] == modules


def test_gradients_are_summed_by_te_in_its_own_linear_layers_only(examined: list[dict[str, Any]]) -> None:
    # Of the four layers the upper two are adapted; the output layer is the engine's.
    assert examined[0][FUSED_GRADIENTS] == {"TELayerNormColumnParallelLinear", "TERowParallelLinear"}


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
@pytest.mark.parametrize("name", VARIANTS)
def test_names_shapes_marks_values_and_shards_are_those_of_the_engines_own_layers(
    examined: list[dict[str, Any]], name: str, layout: str
) -> None:
    for of_rank in examined:
        ours, theirs = of_rank[f"{name} {layout}"]
        assert theirs["tensors"] == ours["tensors"]
        assert theirs["parameters"].keys() == ours["parameters"].keys()
        for key, (shape, marks, values) in ours["parameters"].items():
            assert theirs["parameters"][key][:2] == (shape, marks), key
            assert torch.equal(theirs["parameters"][key][2], values), key


def _count_kernels() -> dict[str, int]:
    """How often a step of a Llama-like model calls the kernels of rotary embeddings and SwiGLU."""
    import transformer_engine_torch

    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        kernel = getattr(transformer_engine_torch, name)

        def call(*args: Any) -> Any:
            counts[name] += 1
            return kernel(*args)

        return call

    for name in KERNELS:
        setattr(transformer_engine_torch, name, counted(name))
    train_tiny(ParallelConfig(), 1, list, with_te(LLAMA))
    return dict(counts)


KERNELS = ("fused_rope_forward", "fused_rope_backward", "swiglu", "dswiglu")


def test_every_layer_rotates_and_activates_with_tes_kernels() -> None:
    (counts,) = run_with_te(_count_kernels, 1)
    passes = LLAMA.num_layers * GLOBAL_BATCH_SIZE
    assert counts == dict(zip(KERNELS, (2 * passes, 2 * passes, passes, passes), strict=True))


def _train_otherwise() -> dict[str, list[float]]:
    parallel = ParallelConfig()
    recomputed = replace(parallel, recompute_granularity="selective")
    te = with_te(LLAMA)
    runs = {
        "norms recomputed": (te, replace(recomputed, recompute_modules=("layernorm",))),
        "attention and MLP recomputed": (te, replace(recomputed, recompute_modules=("core_attn", "mlp"))),
        "layers recomputed": (te, with_full_recompute(parallel)),
        "attention of Transformer Engine": (replace(te, attention_backend="te"), parallel),
        "auto": (replace(te, transformer_impl="auto"), parallel),
    }
    return {name: train_tiny(layout, 3, list, model).losses for name, (model, layout) in runs.items()}


def test_recomputed_and_with_its_own_attention_it_trains_to_the_same_losses() -> None:
    expected = run_single(train_tiny, ParallelConfig(), 3, list, LLAMA).losses
    (found,) = run_with_te(_train_otherwise, 1)
    assert len(found) == 5
    for name, losses in found.items():
        assert losses == pytest.approx(expected, rel=1e-6), name


MOVED = ("Llama", "Llama, sharded optimizer", "GPT-2", "PLE, sharded optimizer")


def _settings(
    case: str, layout: str, model: Callable[[ModelConfig], ModelConfig], **checkpoint: Any
) -> RunSettings:
    variant = VARIANTS[case.split(",")[0]]
    return RunSettings(
        parallel=replace(LAYOUTS[layout], use_distributed_optimizer="sharded" in case),
        checkpoint=CheckpointConfig(**checkpoint),
        model=model(variant.model),
        make_families=variant.make_families,
        micro_batch_size=2,
    )


def _own(model: ModelConfig) -> ModelConfig:
    return model


def _save(settings: RunSettings) -> list[float]:
    run = TinyRun(settings)
    run.train(2)
    run.save()
    return run.train(2)


def _resume(settings: RunSettings) -> tuple[list[float], str]:
    run = TinyRun(settings)
    assert run.progress.iteration == 2
    optimizer: Any = run.optimizer
    base = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    return run.train(2), f"{type(base).__module__.split('.')[0]}.{type(base).__name__}"


def _save_all(
    folder: str, layout: str, model: Callable[[ModelConfig], ModelConfig]
) -> dict[str, list[float]]:
    return {case: _save(_settings(case, layout, model, save=f"{folder}/{case}")) for case in MOVED}


def _resume_all(
    folder: str, layout: str, model: Callable[[ModelConfig], ModelConfig]
) -> dict[str, tuple[list[float], str]]:
    return {case: _resume(_settings(case, layout, model, load=f"{folder}/{case}")) for case in MOVED}


def _resume_and_save(ours: str, theirs: str) -> tuple[Any, Any]:
    return _resume_all(ours, "TP2", with_te), _save_all(theirs, "TP2", with_te)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Any]:
    """Losses of runs without Transformer Engine, of those that it continues, of its own, and of those continued."""
    ours, theirs = (str(tmp_path_factory.mktemp(name)) for name in ("ours", "theirs"))
    expected = run_single(_save_all, ours, "TP1", _own)
    continued, saved = run_with_te(_resume_and_save, 2, ours, theirs)[0]
    return expected, continued, saved, run_single(_resume_all, theirs, "TP1", _own)


@pytest.mark.parametrize("case", MOVED)
def test_a_run_moves_from_the_engines_layers_to_te_and_back_at_another_layout(
    moved: tuple[Any, Any, Any, Any], case: str
) -> None:
    expected, continued, saved, back = (losses[case] for losses in moved)
    assert continued == (pytest.approx(expected, rel=1e-5), "transformer_engine.FusedAdam")
    assert saved == pytest.approx(expected, rel=1e-5)
    assert back[0] == pytest.approx(expected, rel=1e-5) and back[1].startswith("torch.")


def _fp8_context(recipe: Any) -> tuple[str, Any, str]:
    """What megatron-core hands to Transformer Engine's autocast, and why this device, of capability 8.0, refuses."""
    import transformer_engine.pytorch
    from megatron.core.fp8_utils import get_fp8_context

    given: dict[str, Any] = {}
    vars(transformer_engine.pytorch)["fp8_autocast"] = lambda **arguments: given.update(arguments)
    details: dict[str, Any] = {"fp8_amax_history_len": 7, "fp8_amax_compute_algo": "max"}
    details = details if recipe == "delayed" else {}
    model = replace(with_te(LLAMA), fp8_format="hybrid", fp8_recipe=recipe, **details)
    initialize(ParallelConfig(), seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_fp8_context(build_transformer_config(model, ParallelConfig(), precision="bf16"))
    with pytest.raises(ValueError, match="--fp8-format hybrid: ") as refused:
        check_te(model, ParallelConfig())
    found = given["fp8_recipe"]
    history = (found.amax_history_len, found.amax_compute_algo) if recipe == "delayed" else None
    assert found.fp8_format.name == "HYBRID" and given["enabled"]
    return type(found).__name__, history, str(refused.value)


def _fp8_contexts() -> list[tuple[str, Any, str]]:
    return [_fp8_context(recipe) for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")]


def test_fp8_flags_reach_te_and_a_gpu_without_fp8_is_refused_in_its_words() -> None:
    (found,) = run_with_te(_fp8_contexts, 1)
    assert [(name, history) for name, history, _ in found] == [
        ("TEDelayedScaling", (7, "max")),
        ("Float8CurrentScaling", None),
        ("Float8BlockScaling", None),
        ("MXFP8BlockScaling", None),
    ]
    messages = [message for *_, message in found]
    assert messages[0] == messages[1] and "compute capability 8.9" in messages[0]
    assert "compute capability 9.0" in messages[2] and "capability 10.0" in messages[3]
