"""Which of Megatron-LM's arguments an import takes over and which it refuses, and what an export can express."""

import dataclasses
from typing import Any

import pytest
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.megatron import megatron_arguments as tables
from tests.integration.scripts.megatron_scripts import LLAMA3_8B_FP8

PLAIN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 32,
    "position_embedding_type": "rope",
}


def test_every_field_of_the_engines_configuration_is_taken_refused_or_known_to_change_nothing() -> None:
    of_layers = {field.name for field in dataclasses.fields(TransformerConfig)}
    of_layers -= {field.name for field in dataclasses.fields(ModelParallelConfig)}
    assert not {name for name in of_layers if not tables.is_known(name)}
    listed = (tables.TAKEN, set(tables.HARMLESS), tables.WITHOUT_EFFECT)
    assert sum(map(len, listed)) == len(set.union(*listed))
    assert not tables.is_known("an_argument_of_tomorrow")


CHANGED = {
    "apply_residual_connection_post_layernorm": True, "fused_residual_rmsnorm": True, "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 2,
    "no_rope_freq": 2, "mrope_section": [1, 2], "rope_type": "yarn", "multi_latent_attention": True,
    "experimental_attention_variant": "dsa", "linear_attention_freq": 2, "linear_attention_type": "x",
    "softmax_scale": 0.5, "softmax_type": "learnable", "attention_output_gate": True, "qk_l2_norm": True,
    "qk_clip": True, "quick_geglu": True,
    "openai_gelu": True, "onnx_safe": True, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0,
    "num_experts": 8, "num_moe_experts": 8, "mtp_num_layers": 1, "is_hybrid_model": True,
    "hybrid_layer_pattern": "M*", "hybrid_override_pattern": "M*", "heterogeneous_block_specs": True,
    "heterogeneous_layers_config_path": "x.json", "heterogeneous_layers_config_encoded_json": "{}", "use_mup": True,
    "spec": ["a", "b"], "use_legacy_models": True, "yaml_cfg": "x.yaml", "fp4_param": True, "fp4_param_gather": True,
}  # fmt: skip
"""For every argument that is refused, a value that changes the model."""


@pytest.mark.parametrize("name", tables.HARMLESS)
def test_an_argument_that_changes_the_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"common.pt: --{name.replace('_', '-')} .*cannot be imported"):
        tables.read_model({**PLAIN, name: CHANGED[name]}, 97, 104, "common.pt")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"rotary_seq_len_interpolation_factor": 2.0}, "--rotary-seq-len-interpolation-factor 2.0"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 4.0}, "--rope-scaling-factor 4.0"),
        ({"disable_bias_linear": True, "add_mlp_bias": True}, "--add-mlp-bias"),
        ({"disable_bias_linear": True, "add_attention_output_bias": True}, "--add-attention-output-bias"),
    ],
)
def test_an_export_refuses_by_flag_what_megatron_lacks(changes: dict[str, Any], flag: str) -> None:
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=16, **changes)
    with pytest.raises(
        ValueError, match=f"built with {flag} and cannot be exported; Megatron-LM has no such model"
    ):
        tables.export_arguments(model, 97, 104)


@pytest.mark.parametrize(
    ("frequency", "windows"),
    [(None, (9, 9)), (2, (9, None)), (1, (None, None)), ([0, 1], (None, 9)), ([1, 1], (9, 9))],
)
def test_windows_are_read_and_written_as_megatron_stores_them(
    frequency: Any, windows: tuple[int | None, ...]
) -> None:
    stored = {**PLAIN, "window_size": (8, 0), "window_attn_skip_freq": frequency}
    model, _ = tables.read_model(stored, 97, 104, "common.pt")
    assert model.windows == windows
    exported = tables.export_arguments(model, 97, 104)
    assert exported["window_size"] == (8, 0)
    assert [
        is_layer_window_attention((8, 0), exported["window_attn_skip_freq"], layer) for layer in (1, 2)
    ] == [window is not None for window in windows]


def test_an_export_names_the_flags_that_megatron_does_not_read_from_it() -> None:
    stored = {**PLAIN, "window_size": (8, 0), "window_attn_skip_freq": [0, 1], "apply_layernorm_1p": True}
    model, _ = tables.read_model(stored, 97, 104, "common.pt")
    assert (
        tables.flags_beside_checkpoint(model)
        == "--apply-layernorm-1p --window-size 8,0 --window-attn-skip-freq [0,1]"
    )
    assert tables.flags_beside_checkpoint(tables.read_model(PLAIN, 97, 104, "common.pt")[0]) == ""


@pytest.mark.parametrize("size", [(8, -1), (-1, 0), (8, 4)])
def test_a_window_that_is_not_causal_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="common.pt: .*--window-size .*: must be two numbers such as 511,0"):
        tables.read_model({**PLAIN, "window_size": size}, 97, 104, "common.pt")


@pytest.mark.parametrize(
    ("stored", "is_difference"),
    [
        ({"apply_layernorm_1p": True}, True),
        ({"layernorm_zero_centered_gamma": True}, True),
        # --use-checkpoint-args of a newer version sets the old name, with which that version does not compute.
        ({"apply_layernorm_1p": True, "layernorm_zero_centered_gamma": False}, False),
    ],
)
def test_norms_are_read_by_the_name_with_which_the_version_computes(
    stored: dict[str, bool], is_difference: bool
) -> None:
    model, _ = tables.read_model({**PLAIN, **stored}, 97, 104, "common.pt")
    assert model.apply_layernorm_1p is is_difference


def test_the_model_of_the_llama_3_example_is_read_from_its_own_arguments() -> None:
    flags: dict[str, Any] = {}
    for word in LLAMA3_8B_FP8.split():
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            flags[name] = True
        else:
            flags[name] = float(word) if word[0].isdigit() and "," not in word else word
            flags[name] = int(word) if word.isdecimal() else flags[name]
    stored = flags | {"add_bias_linear": False, "fp8": flags["fp8_format"], "tensor_model_parallel_size": 1}
    model, messages = tables.read_model(stored, 128257, 128384, "common.pt")
    assert messages == []
    assert (model.apply_layernorm_1p, model.normalization, model.swiglu) == (True, "RMSNorm", True)
    assert (model.num_layers, model.num_query_groups, model.rotary_base) == (32, 8, 1e6)
    assert model.disable_bias_linear and model.untie_embeddings_and_output_weights
