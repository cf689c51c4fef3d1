"""What becomes of the fields of Gemma 3n's configuration, where it differs from other models; see `test_hf_fields`."""

from typing import Any

from tests.unit.interop.hf_models import LLAMA3_SCALING, Kind

Cases = dict[str, list[tuple[dict[str, Any], str]]]

TAKEN, REFUSED, SAME = "taken over", "refused", "without effect"
FULL, MIXED = ["full_attention"] * 2, ["full_attention", "sliding_attention"]

BASE = Kind(
    "Gemma3n",
    {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 8,
        "sliding_window": 20,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 90,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    },
)

ONLY: Cases = {
    "altup_active_idx": [({"altup_active_idx": 1}, REFUSED)],
    "altup_coef_clip": [
        ({"altup_coef_clip": 0.5}, SAME),  # it has an effect in training only
        ({"altup_coef_clip": 0.0}, REFUSED),
        ({"altup_coef_clip": 120}, REFUSED),
    ],
    "altup_correct_scale": [({"altup_correct_scale": False}, REFUSED)],
    "altup_num_inputs": [({"altup_num_inputs": 2}, TAKEN), ({"altup_num_inputs": 1}, REFUSED)],
    "laurel_rank": [({"laurel_rank": 6}, TAKEN), ({"laurel_rank": 0}, REFUSED)],
    "activation_sparsity_pattern": [
        ({"activation_sparsity_pattern": [0.5, 0.0]}, TAKEN),
        ({"activation_sparsity_pattern": [0.0, 0.0]}, SAME),
        ({"activation_sparsity_pattern": [0.5, 1.0]}, REFUSED),
        ({"activation_sparsity_pattern": [0.5, 0]}, REFUSED),
        ({"activation_sparsity_pattern": [0.5]}, REFUSED),
        ({"activation_sparsity_pattern": 0.5}, REFUSED),
    ],
}
"""Fields that no other class has."""

_DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
_LINEAR = {"rope_type": "linear", "factor": 8.0}
OTHERWISE: Cases = {
    "rope_parameters": [
        ({"rope_parameters": {"full_attention": _DEFAULT}}, TAKEN),
        ({"rope_parameters": {"sliding_attention": _DEFAULT}}, TAKEN),
        ({"rope_parameters": {"full_attention": _LINEAR}}, TAKEN),
        ({"rope_parameters": {"full_attention": LLAMA3_SCALING}}, TAKEN),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, REFUSED),
        ({"rope_parameters": {"sliding_attention": _LINEAR}}, REFUSED),
        ({"rope_parameters": _DEFAULT}, REFUSED),
        ({"rope_parameters": None}, SAME),
    ],
    "layer_types": [
        ({"layer_types": FULL}, TAKEN),
        ({"layer_types": MIXED}, TAKEN),
        ({"layer_types": ["sliding_attention", "full_attention"]}, SAME),
        ({"layer_types": None}, TAKEN),  # every fifth layer has no window
        ({"layer_types": FULL[:1]}, REFUSED),
        ({"layer_types": ["chunked_attention"] * 2}, REFUSED),
    ],
    "num_hidden_layers": [
        ({"num_hidden_layers": 3, "layer_types": ["sliding_attention", *MIXED]}, TAKEN),
        (
            {"num_hidden_layers": 11, "layer_types": [*MIXED * 5, "full_attention"]},
            TAKEN,
        ),  # of which 10 are sparse
    ],
    "intermediate_size": [
        ({"intermediate_size": 40}, TAKEN),
        ({"intermediate_size": [40, 24]}, TAKEN),
        ({"intermediate_size": [40]}, REFUSED),
        ({"intermediate_size": [40, 0]}, REFUSED),
        ({"intermediate_size": [40, 24.0]}, REFUSED),
    ],
    "vocab_size_per_layer_input": [
        ({"vocab_size_per_layer_input": 96}, TAKEN),
        ({"vocab_size_per_layer_input": 50}, TAKEN),
        ({"vocab_size_per_layer_input": 97}, REFUSED),
        ({"vocab_size_per_layer_input": 0}, REFUSED),
    ],
    "hidden_size_per_layer_input": [
        ({"hidden_size_per_layer_input": 12}, TAKEN),
        ({"hidden_size_per_layer_input": 0}, REFUSED),
    ],
    "pad_token_id": [
        ({"pad_token_id": 5}, SAME),
        ({"pad_token_id": 93}, REFUSED),
        ({"pad_token_id": 500}, REFUSED),
    ],
}

MODEL_TYPE: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, REFUSED),
    ({"model_type": ...}, REFUSED),
]

NOT_IN_ITS_CLASS: Cases = {
    "sliding_window_pattern": [({"sliding_window_pattern": 1}, SAME)],
    "query_pre_attn_scalar": [({"query_pre_attn_scalar": 20}, SAME)],
}
