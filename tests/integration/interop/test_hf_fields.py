"""Each field of transformers' configuration classes is taken over, refused by name, or without effect on logits."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_ext.interop.formats.configs.hf_config import ARCHITECTURES
from tests.integration.interop import field_cases, gemma3n_fields
from tests.integration.interop.field_cases import DYNAMIC, FULL, LONGROPE, MIXED
from tests.integration.interop.judging import Verdict, judge
from tests.unit.interop.hf_models import LLAMA3_SCALING, YARN, Kind, alone

TAKEN, REFUSED, SAME = "taken over", "refused", "without effect"
ALL = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Gemma4", "Gemma3n", *field_cases.BASES)
QWEN = ("Qwen2", "Qwen3")
TWO_LAYERS = {"num_hidden_layers": 2}
BASES = {
    "Llama": Kind("Llama", TWO_LAYERS),
    "Mistral": Kind("Mistral", {**TWO_LAYERS, "sliding_window": None}),
    "Qwen2": Kind("Qwen2", TWO_LAYERS),
    "Qwen3": Kind("Qwen3", {**TWO_LAYERS, "head_dim": 8}),
    "Gemma3": Kind(
        "Gemma3", {**TWO_LAYERS, "head_dim": 8, "sliding_window": 20, "sliding_window_pattern": 2}
    ),
    "Gemma4": Kind(
        "Gemma4",
        {
            **TWO_LAYERS,
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 20,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
        },
    ),
    "Gemma3n": gemma3n_fields.BASE,
    **field_cases.BASES,
}
PARTIAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
ROPES = {"full_attention": PARTIAL, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}

# Field -> changes of config.json, and what becomes of each. Every field of the classes is in here.
FIELDS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "vocab_size": [({"vocab_size": 101}, TAKEN)],
    "hidden_size": [({"hidden_size": 48}, TAKEN)],
    "intermediate_size": [({"intermediate_size": 40}, TAKEN)],
    "num_hidden_layers": [({"num_hidden_layers": 3}, TAKEN)],
    "num_attention_heads": [({"num_attention_heads": 8, "num_key_value_heads": 4}, TAKEN)],
    "num_key_value_heads": [({"num_key_value_heads": 1}, TAKEN), ({"num_key_value_heads": 3}, REFUSED)],
    "head_dim": [({"head_dim": 12}, TAKEN), ({"head_dim": 0}, REFUSED), ({"head_dim": 7}, REFUSED)],
    "hidden_act": [
        ({"hidden_act": "swish"}, SAME),
        ({"hidden_act": "gelu"}, REFUSED),
        ({"hidden_act": "gelu_pytorch_tanh"}, REFUSED),
    ],
    "max_position_embeddings": [({"max_position_embeddings": 50}, SAME)],
    "initializer_range": [({"initializer_range": 0.5}, SAME)],
    "rms_norm_eps": [({"rms_norm_eps": 0.1}, TAKEN), ({"rms_norm_eps": 0.0}, REFUSED)],
    "use_cache": [({"use_cache": False}, SAME)],
    "pad_token_id": [({"pad_token_id": 5}, SAME), ({"pad_token_id": 500}, REFUSED)],
    "bos_token_id": [({"bos_token_id": 7}, SAME)],
    "eos_token_id": [({"eos_token_id": [3, 5, 9]}, SAME)],
    "pretraining_tp": [({"pretraining_tp": 2}, SAME)],
    "tie_word_embeddings": [
        ({"tie_word_embeddings": True}, TAKEN),
        ({"tie_word_embeddings": None}, REFUSED),
    ],
    "rope_parameters": [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, TAKEN),
        ({"rope_parameters": {"rope_theta": 500}}, TAKEN),
        ({"rope_parameters": {"factor": 4.0}, "rope_theta": 500.0}, TAKEN),
        ({"rope_parameters": LLAMA3_SCALING}, TAKEN),
        ({"rope_parameters": {**LLAMA3_SCALING, "attention_factor": 2.0}}, TAKEN),
        ({"rope_parameters": {"type": "linear", "factor": 3}}, TAKEN),
        ({"rope_parameters": {"rope_type": "linear", "type": "default", "factor": 3.0}}, TAKEN),
        ({"rope_parameters": {"type": "linear", "rope_type": "default", "factor": 3.0}}, SAME),
        ({"rope_parameters": YARN}, TAKEN),
        ({"rope_parameters": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 0}}, TAKEN),
        ({"rope_parameters": {**YARN, "attention_factor": 0.7, "mscale": 1}}, TAKEN),
        ({"rope_parameters": {**YARN, "truncate": False}}, REFUSED),
        ({"rope_parameters": {**YARN, "beta_fast": 0.1}}, REFUSED),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 32}}, REFUSED),
        ({"rope_parameters": LONGROPE}, REFUSED),
        ({"rope_parameters": DYNAMIC}, SAME),
        ({"rope_parameters": DYNAMIC, "max_position_embeddings": 32}, TAKEN),
        ({"rope_parameters": {"rope_type": "dynamic"}}, REFUSED),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 5e3}}, REFUSED),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, REFUSED),
        ({"rope_parameters": {"rope_type": "su", "factor": 2.0}}, REFUSED),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}}, REFUSED),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, REFUSED),
    ],
    "attention_bias": [({"attention_bias": True}, TAKEN)],
    "mlp_bias": [({"mlp_bias": True}, TAKEN)],
    "attention_dropout": [({"attention_dropout": 0.5}, SAME), ({"attention_dropout": 1.5}, REFUSED)],
    "sliding_window": [({"sliding_window": 16}, TAKEN), ({"sliding_window": 0}, REFUSED)],
    "use_sliding_window": [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, TAKEN)
    ],
    "max_window_layers": [
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, TAKEN),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, SAME),
    ],
    "layer_types": [
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": FULL}, SAME),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": MIXED}, TAKEN),
        ({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["attention"] * 2}, SAME),
        ({"layer_types": MIXED}, REFUSED),
        ({"layer_types": FULL[:1]}, REFUSED),
        ({"layer_types": ["chunked_attention"] * 2}, REFUSED),
    ],
    # Of Gemma 3 only.
    "hidden_activation": [
        ({"hidden_activation": "gelu_pytorch_tanh"}, SAME),
        ({"hidden_activation": "gelu"}, REFUSED),
        ({"hidden_activation": "silu"}, REFUSED),
    ],
    "query_pre_attn_scalar": [
        ({"query_pre_attn_scalar": 20}, TAKEN),
        ({"query_pre_attn_scalar": 0}, REFUSED),
        ({"query_pre_attn_scalar": 1.5}, REFUSED),
    ],
    "final_logit_softcapping": [
        ({"final_logit_softcapping": 2.0}, TAKEN),
        ({"final_logit_softcapping": 0.0}, REFUSED),
        ({"final_logit_softcapping": 30}, REFUSED),
    ],
    "attn_logit_softcapping": [({"attn_logit_softcapping": 50.0}, REFUSED)],
    "use_bidirectional_attention": [
        ({"use_bidirectional_attention": True}, REFUSED),
        ({"use_bidirectional_attention": None}, SAME),
    ],
    # Of Gemma 4 only.
    "vocab_size_per_layer_input": [
        ({"vocab_size_per_layer_input": 97}, REFUSED),
        ({"vocab_size_per_layer_input": 50, "hidden_size_per_layer_input": 0}, TAKEN),
    ],
    "hidden_size_per_layer_input": [
        ({"hidden_size_per_layer_input": 12}, TAKEN),
        ({"hidden_size_per_layer_input": 0}, TAKEN),
        ({"hidden_size_per_layer_input": -1}, REFUSED),
    ],
    "attention_k_eq_v": [({"attention_k_eq_v": True}, TAKEN)],
    "num_kv_shared_layers": [
        ({"num_kv_shared_layers": 2, **FOUR_LAYERS}, TAKEN),
        ({"num_kv_shared_layers": 1}, REFUSED),
        ({"num_kv_shared_layers": 2}, REFUSED),
        ({"num_kv_shared_layers": -1}, REFUSED),
    ],
    "use_double_wide_mlp": [
        ({"use_double_wide_mlp": True}, SAME),
        ({"use_double_wide_mlp": True, "num_kv_shared_layers": 2, **FOUR_LAYERS}, TAKEN),
    ],
    "enable_moe_block": [
        (
            {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8},
            REFUSED,
        )
    ],
    "num_experts": [({"num_experts": 2}, SAME)],
    "top_k_experts": [({"top_k_experts": 2}, SAME)],
    "moe_intermediate_size": [({"moe_intermediate_size": 16}, SAME)],
    # Of the base class.
    "transformers_version": [({"transformers_version": "4.40.0"}, SAME)],
    "architectures": [
        ({"architectures": ["LlamaForSequenceClassification"]}, REFUSED),
        ({"architectures": None}, SAME),
    ],
    "output_hidden_states": [({"output_hidden_states": True}, SAME)],
    "return_dict": [({"return_dict": False}, REFUSED)],
    "dtype": [({"dtype": "bfloat16"}, SAME), ({"dtype": "float7"}, REFUSED)],
    "chunk_size_feed_forward": [({"chunk_size_feed_forward": 2}, SAME)],
    "is_encoder_decoder": [({"is_encoder_decoder": True}, SAME)],
    "id2label": [({"id2label": {"0": "a", "1": "b", "2": "c"}}, SAME)],
    "label2id": [({"label2id": {"a": 0, "b": 1}}, SAME)],
    "problem_type": [({"problem_type": "regression"}, SAME)],
}

FIELDS |= field_cases.FIELDS

# What a class takes beside its fields: names of earlier versions, and what code shared by all models reads.
BESIDE: dict[str, list[tuple[dict[str, Any], str]]] = {
    "rope_theta": [
        ({"rope_theta": 500.0}, TAKEN),
        ({"rope_theta": 500}, TAKEN),
        ({"rope_theta": "10000"}, REFUSED),
        ({"rope_theta": None}, REFUSED),
    ],
    "rope_scaling": [
        ({"rope_scaling": None, "rope_theta": 500.0}, TAKEN),
        ({"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500.0}, TAKEN),
        ({"rope_scaling": LLAMA3_SCALING, "rope_parameters": {"rope_theta": 7.0}}, TAKEN),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, SAME),
        ({"rope_scaling": {**YARN, "type": "yarn"}}, TAKEN),
        ({"rope_scaling": {"type": "linear", "factor": "3"}}, REFUSED),
    ],
    "original_max_position_embeddings": [
        ({"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 16}, TAKEN),
        ({"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": None}, REFUSED),
        ({"original_max_position_embeddings": 16}, SAME),
    ],
    "partial_rotary_factor": [
        ({"partial_rotary_factor": 1.0}, SAME),
        ({"partial_rotary_factor": 0.5}, REFUSED),
    ],
    "torch_dtype": [({"torch_dtype": "bfloat16"}, SAME)],
    "num_labels": [({"num_labels": 3}, SAME)],
    "output_attentions": [({"output_attentions": True}, SAME)],
    "name_or_path": [({"name_or_path": "x", "_name_or_path": "y", "_commit_hash": "z"}, SAME)],
    "auto_map": [({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, SAME)],
    "temperature": [({"temperature": 0.3, "do_sample": True, "max_length": 7}, SAME)],
    "attention_multiplier": [({"attention_multiplier": 2.0, "no_rope_layers": [0, 1]}, SAME)],
    "is_causal": [({"is_causal": False}, REFUSED)],
    "per_layer_config": [({"per_layer_config": {"1": {"intermediate_size": 40}}}, REFUSED)],
    "attention_chunk_size": [({"attention_chunk_size": 8}, REFUSED)],
    "quantization_config": [({"quantization_config": {"quant_method": "awq", "bits": 4}}, REFUSED)],
    "transformers_weights": [({"transformers_weights": "other.safetensors"}, REFUSED)],
    "configuration_files": [({"configuration_files": ["config.4.0.0.json"]}, REFUSED)],
    "text_config": [({"text_config": {"hidden_size": 16}}, REFUSED)],
    "model_type": [
        ({"model_type": "cohere"}, REFUSED),
        ({"model_type": "granitemoe", "num_local_experts": 8}, REFUSED),
        ({"model_type": ...}, REFUSED),
    ],
}
# Where a family differs from what is said above.
OTHERWISE: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {
    ("Llama", "num_attention_heads"): [
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, TAKEN),
        ({"num_attention_heads": 6, "head_dim": 8}, REFUSED),
    ],
    **{
        (family, "sliding_window"): [({"sliding_window": 16}, SAME), ({"sliding_window": 0}, SAME)]
        for family in QWEN
    },
    ("Mistral", "hidden_size"): [({"hidden_size": 34}, TAKEN)],
    ("Gemma3", "num_attention_heads"): [
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, TAKEN),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, REFUSED),
    ],
    ("Gemma3", "tie_word_embeddings"): [
        ({"tie_word_embeddings": False}, TAKEN),
        ({"tie_word_embeddings": True}, SAME),
        ({"tie_word_embeddings": None}, REFUSED),
    ],
    ("Gemma3", "sliding_window"): [
        ({"sliding_window": 16}, TAKEN),
        ({"sliding_window": 0}, REFUSED),
        ({"sliding_window": None}, REFUSED),
        ({"sliding_window": None, "layer_types": FULL}, REFUSED),
    ],
    ("Gemma3", "layer_types"): [
        ({"layer_types": FULL}, TAKEN),
        ({"layer_types": MIXED}, TAKEN),
        ({"layer_types": ["sliding_attention", "full_attention"]}, SAME),
        ({"layer_types": FULL[:1]}, REFUSED),
        ({"layer_types": ["chunked_attention"] * 2}, REFUSED),
    ],
    ("Gemma3", "rope_parameters"): [
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}}, TAKEN),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 5.0}}}, TAKEN),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, TAKEN),
        ({"rope_parameters": {"full_attention": LLAMA3_SCALING}}, TAKEN),
        ({"rope_parameters": {"full_attention": YARN}}, TAKEN),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}}, REFUSED),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, REFUSED),
        ({"rope_parameters": None}, SAME),
    ],
    ("Gemma4", "vocab_size"): [({"vocab_size": 101, "vocab_size_per_layer_input": 101}, TAKEN)],
    ("Gemma4", "tie_word_embeddings"): [
        ({"tie_word_embeddings": False}, TAKEN),
        ({"tie_word_embeddings": True}, SAME),
        ({"tie_word_embeddings": None}, REFUSED),
    ],
    ("Gemma4", "sliding_window"): [
        ({"sliding_window": 16}, TAKEN),
        ({"sliding_window": 0}, REFUSED),
        ({"sliding_window": None}, REFUSED),
    ],
    ("Gemma4", "layer_types"): [
        ({"layer_types": FULL}, TAKEN),
        ({"layer_types": MIXED}, TAKEN),  # the last layer then has no window either
        ({"layer_types": ["sliding_attention", "full_attention"]}, SAME),
        ({"layer_types": FULL[:1]}, REFUSED),
        ({"layer_types": ["chunked_attention"] * 2}, REFUSED),
    ],
    ("Gemma4", "use_bidirectional_attention"): [
        ({"use_bidirectional_attention": "all"}, REFUSED),
        ({"use_bidirectional_attention": "vision"}, SAME),
        ({"use_bidirectional_attention": True}, REFUSED),
    ],
    ("Gemma4", "rope_parameters"): [
        (
            {"rope_parameters": {**ROPES, "full_attention": {"rope_type": "default", "rope_theta": 500.0}}},
            TAKEN,
        ),
        (
            {"rope_parameters": {**ROPES, "sliding_attention": {"rope_type": "default", "rope_theta": 5.0}}},
            TAKEN,
        ),
        ({"rope_parameters": {**ROPES, "full_attention": {**PARTIAL, "partial_rotary_factor": 0.5}}}, TAKEN),
        ({"rope_parameters": {**ROPES, "full_attention": {**PARTIAL, "factor": 4.0}}}, TAKEN),
        (
            {"rope_parameters": {**ROPES, "full_attention": {**PARTIAL, "partial_rotary_factor": 2.0}}},
            REFUSED,
        ),
        (
            {"rope_parameters": {**ROPES, "full_attention": {**PARTIAL, "partial_rotary_factor": 0.01}}},
            REFUSED,
        ),
        ({"rope_parameters": {**ROPES, "full_attention": LLAMA3_SCALING}}, TAKEN),
        ({"rope_parameters": {**ROPES, "full_attention": YARN}}, TAKEN),
        ({"rope_parameters": {**ROPES, "sliding_attention": PARTIAL}}, REFUSED),
        ({"rope_parameters": {"full_attention": PARTIAL}}, REFUSED),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, REFUSED),
        ({"rope_parameters": None}, SAME),
    ],
    ("Mistral", "layer_types"): [({"layer_types": MIXED, "sliding_window": 16}, REFUSED)],
}
OTHERWISE |= field_cases.OTHERWISE
NOT_IN_ITS_CLASS: dict[str, dict[str, list[tuple[dict[str, Any], str]]]] = {
    "Llama": {
        "sliding_window": [({"sliding_window": 16}, REFUSED)],
        "layer_types": [({"layer_types": FULL}, SAME), ({"layer_types": MIXED}, REFUSED)],
    },
    "Mistral": {
        "layer_types": OTHERWISE["Mistral", "layer_types"],
        "attention_bias": [({"attention_bias": True, "mlp_bias": True}, SAME)],
    },
    "Qwen2": {
        "head_dim": [({"head_dim": 12}, TAKEN), ({"head_dim": None}, REFUSED)],
        "attention_bias": [({"attention_bias": True, "mlp_bias": True}, SAME)],
    },
    "Qwen3": {"mlp_bias": [({"mlp_bias": True}, SAME)]},
    "Gemma3": {
        "mlp_bias": [({"mlp_bias": True, "hidden_act": "relu"}, SAME)],
        "sliding_window_pattern": [
            ({"sliding_window_pattern": 1}, TAKEN),
            ({"sliding_window_pattern": 0}, REFUSED),
        ],
        "rope_local_base_freq": [({"rope_local_base_freq": 5.0}, TAKEN)],
        "cache_implementation": [({"cache_implementation": "hybrid"}, SAME)],
    },
    "Gemma4": {
        "mlp_bias": [({"mlp_bias": True, "hidden_act": "relu"}, SAME)],
        "global_head_dim": [
            ({"global_head_dim": 12}, TAKEN),
            ({"global_head_dim": 7}, REFUSED),
            ({"global_head_dim": 0}, REFUSED),
        ],
        "num_global_key_value_heads": [
            ({"num_global_key_value_heads": 1}, SAME),
            ({"num_global_key_value_heads": 1, "attention_k_eq_v": True}, TAKEN),
            ({"num_global_key_value_heads": 3, "attention_k_eq_v": True}, REFUSED),
        ],
    },
    **field_cases.NOT_IN_ITS_CLASS,
}
# What a family takes beside its fields otherwise than is said above.
BESIDE_OTHERWISE: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {
    ("Gemma3", "rope_scaling"): [
        ({"rope_scaling": None, "rope_theta": 500.0}, TAKEN),
        ({"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 500.0}, TAKEN),
        ({"rope_scaling": LLAMA3_SCALING}, TAKEN),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, REFUSED),
    ],
    ("Gemma4", "rope_theta"): [({"rope_theta": 500.0}, SAME), ({"rope_theta": None}, SAME)],
    ("Gemma4", "rope_scaling"): [
        ({"rope_scaling": None}, REFUSED),
        ({"rope_scaling": {"rope_type": "linear", "factor": 3.0}}, REFUSED),
    ],
    ("Gemma4", "original_max_position_embeddings"): [({"original_max_position_embeddings": 16}, SAME)],
    ("Gemma4", "model_type"): [({"model_type": "gemma2"}, REFUSED), ({"model_type": ...}, REFUSED)],
    ("Gemma4", "partial_rotary_factor"): [({"partial_rotary_factor": 0.5}, REFUSED)],
    ("Gemma4", "per_layer_config"): [
        ({"per_layer_config": {"1": {"head_dim": 12}}}, TAKEN),
        ({"per_layer_config": {"1": {"head_dim": 12, "num_key_value_heads": 1}}}, TAKEN),
        ({"per_layer_config": {"1": {"intermediate_size": 40}}}, REFUSED),
        ({"per_layer_config": {"0": {"head_dim": 12}}}, REFUSED),
    ],
    ("Gemma3", "original_max_position_embeddings"): [
        ({"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 16}, REFUSED),
        ({"original_max_position_embeddings": 16}, SAME),
    ],
}
FIELDS |= gemma3n_fields.ONLY
_LIKE_GEMMA3 = ("num_attention_heads", "tie_word_embeddings", "sliding_window")
OTHERWISE |= {("Gemma3n", name): OTHERWISE["Gemma3", name] for name in _LIKE_GEMMA3}
OTHERWISE |= {("Gemma3n", name): cases for name, cases in gemma3n_fields.OTHERWISE.items()}
NOT_IN_ITS_CLASS["Gemma3n"] = {**NOT_IN_ITS_CLASS["Gemma3"], **gemma3n_fields.NOT_IN_ITS_CLASS}
BESIDE_OTHERWISE |= {
    ("Gemma3n", name): BESIDE_OTHERWISE["Gemma3", name]
    for name in ("rope_scaling", "original_max_position_embeddings")
}
BESIDE_OTHERWISE["Gemma3n", "model_type"] = gemma3n_fields.MODEL_TYPE


BESIDE_OTHERWISE |= field_cases.BESIDE_OTHERWISE


def _class_fields(family: str) -> list[str]:
    return [field.name for field in dataclasses.fields(BASES[family].config_class)]


def _cases(family: str) -> list[tuple[str, dict[str, Any], str]]:
    of_class = {name: OTHERWISE.get((family, name), FIELDS[name]) for name in _class_fields(family)}
    beside = {name: BESIDE_OTHERWISE.get((family, name), cases) for name, cases in BESIDE.items()}
    if family in field_cases.BASES:  # the rest of these are read alike for every family
        beside = {name: cases for name, cases in beside.items() if (family, name) in BESIDE_OTHERWISE}
    sections = (of_class, NOT_IN_ITS_CLASS[family], beside)
    return [(name, *case) for section in sections for name, cases in section.items() for case in cases]


def _check(name: str, change: dict[str, Any], verdict: Verdict, expected: str | None) -> str | None:
    """What is wrong with a verdict, None where all is well."""
    if verdict.refusal is not None:
        named = any(word in verdict.refusal for word in _names(name, change))
        is_expected = expected in (REFUSED, None) and named and "\n" not in verdict.refusal
        return None if is_expected else f"refused: {verdict.refusal}"
    if verdict.difference is None:
        return f"taken over, but transformers refuses: {verdict.theirs}"
    if not verdict.difference < 1e-5:
        return f"taken over with a difference of {verdict.difference}"
    if verdict.lost:
        return f"lost on export: {sorted(verdict.lost)}"
    effect = TAKEN if verdict.has_effect else SAME
    return None if expected in (effect, None) else f"{effect}, expected: {expected}"


def _names(name: str, change: dict[str, Any]) -> set[str]:
    return {
        name,
        *change,
        *(["rope scaling", "rope_theta", "partial_rotary_factor"] if "rope" in name else []),
        *(["layer_types"] if name == "num_hidden_layers" else []),
    }


def test_every_supported_architecture_is_among_them() -> None:
    assert {BASES[family].config_class.model_type for family in ALL} == set(ARCHITECTURES.values())


@pytest.mark.parametrize("family", ALL)
def test_every_field_of_the_class_is_taken_over_or_refused_by_name_or_without_effect(
    family: str, tmp_path: Path
) -> None:
    cases = _cases(family)
    verdicts = alone(judge, str(tmp_path), BASES[family], [change for _, change, _ in cases])
    wrong = [
        f"{change}: {message}"
        for (name, change, expected), verdict in zip(cases, verdicts, strict=True)
        if (message := _check(name, change, verdict, expected))
    ]
    assert not wrong, "\n".join(wrong)
    assert {name for name, _, _ in cases} >= set(_class_fields(family))


ODD = ("x", "10", None, 0, -1, 1, True, 1.5, 2.0, [1], {"a": 1})


@pytest.mark.parametrize("family", ALL)
def test_a_value_that_transformers_refuses_in_any_field_is_refused_by_name(
    family: str, tmp_path: Path
) -> None:
    own = set(_class_fields(family)) - {f.name for f in dataclasses.fields(transformers.PretrainedConfig)} | {
        "rope_theta",
        "rope_scaling",
    }
    if family in field_cases.BASES:  # the types of all other fields are checked alike for every family
        own -= set(_class_fields("Llama"))
    changes = [{name: value} for name in sorted(own) for value in ODD]
    verdicts = alone(judge, str(tmp_path), BASES[family], changes)
    wrong = [
        f"{change}: {message}"
        for change, verdict in zip(changes, verdicts, strict=True)
        if (message := _check(next(iter(change)), change, verdict, None))
    ]
    assert not wrong, "\n".join(wrong)
