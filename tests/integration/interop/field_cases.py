"""Cases of `test_hf_fields` for Phi-3, OLMo 2 and 3, SmolLM3 and Granite, where they differ from a Llama's."""

from typing import Any

from tests.unit.interop.hf_models import LLAMA3_SCALING, YARN, Kind

TAKEN, REFUSED, SAME = "taken over", "refused", "without effect"
Cases = list[tuple[dict[str, Any], str]]
TWO_LAYERS = {"num_hidden_layers": 2, "pad_token_id": None}
FULL, MIXED = ["full_attention"] * 2, ["full_attention", "sliding_attention"]
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [2.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}

BASES = {
    "Phi3": Kind("Phi3", TWO_LAYERS),
    # A larger epsilon, because the norm of a small output multiplies differences of rounding.
    "Olmo2": Kind("Olmo2", {**TWO_LAYERS, "rms_norm_eps": 0.01}),
    "Olmo3": Kind(
        "Olmo3",
        {
            **TWO_LAYERS,
            "rms_norm_eps": 0.01,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "SmolLM3": Kind("SmolLM3", TWO_LAYERS),
    "Granite": Kind("Granite", TWO_LAYERS),
}

# Fields that no other class has.
FIELDS: dict[str, Cases] = {
    "resid_pdrop": [({"resid_pdrop": 0.5}, REFUSED), ({"resid_pdrop": 0}, SAME)],
    "embd_pdrop": [({"embd_pdrop": 0.5}, SAME)],
    "original_max_position_embeddings": [
        ({"original_max_position_embeddings": 16}, SAME),
        ({"original_max_position_embeddings": None}, REFUSED),
        ({"original_max_position_embeddings": 16, "rope_scaling": LONGROPE}, TAKEN),
        ({"original_max_position_embeddings": 1, "rope_scaling": LONGROPE}, REFUSED),
    ],
    "no_rope_layers": [
        ({"no_rope_layers": [1, 0]}, TAKEN),
        ({"no_rope_layers": [0, 0]}, TAKEN),
        ({"no_rope_layers": None}, SAME),
        ({"no_rope_layers": [1]}, REFUSED),
        ({"no_rope_layers": [1, 2]}, REFUSED),
    ],
    "no_rope_layer_interval": [
        ({"no_rope_layer_interval": 2}, TAKEN),
        ({"no_rope_layer_interval": 0}, REFUSED),
    ],
    "embedding_multiplier": [({"embedding_multiplier": 3.0}, TAKEN), ({"embedding_multiplier": 0}, REFUSED)],
    "logits_scaling": [({"logits_scaling": 8}, TAKEN), ({"logits_scaling": -1.0}, REFUSED)],
    "residual_multiplier": [({"residual_multiplier": 0.3}, TAKEN), ({"residual_multiplier": 0.0}, REFUSED)],
    "attention_multiplier": [
        ({"attention_multiplier": 0.05}, TAKEN),
        ({"attention_multiplier": None}, REFUSED),
    ],
}

_TIED: Cases = [
    ({"tie_word_embeddings": False}, TAKEN),
    ({"tie_word_embeddings": True}, SAME),
    ({"tie_word_embeddings": None}, REFUSED),
]
_LAYERED_ROPE: Cases = [
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0}}}, TAKEN),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 5.0}}}, TAKEN),
    ({"rope_parameters": {"full_attention": YARN}}, TAKEN),
    ({"rope_parameters": {"full_attention": LLAMA3_SCALING}}, TAKEN),
    ({"rope_parameters": {"full_attention": DYNAMIC}}, REFUSED),
    ({"rope_parameters": {"full_attention": {**YARN, "truncate": False}}}, REFUSED),
    ({"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}}, REFUSED),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, REFUSED),
    ({"rope_parameters": None}, SAME),
]
OTHERWISE: dict[tuple[str, str], Cases] = {
    ("Phi3", "rope_parameters"): [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, TAKEN),
        ({"rope_parameters": {"rope_theta": 500, "partial_rotary_factor": 0.5}}, TAKEN),
        ({"rope_parameters": {**LONGROPE, "attention_factor": 2}, "rope_theta": 500.0}, TAKEN),
        ({"rope_parameters": {**LONGROPE, "factor": 4.0}, "original_max_position_embeddings": 60}, TAKEN),
        ({"rope_parameters": {**LONGROPE, "short_factor": [1.0] * 3}}, REFUSED),
        ({"rope_parameters": {**LONGROPE, "long_factor": [1.0, 1.0, 1.0, 0.0]}}, REFUSED),
        ({"rope_parameters": LONGROPE, "head_dim": 12}, REFUSED),
        ({"rope_parameters": LLAMA3_SCALING}, REFUSED),
        ({"rope_parameters": YARN}, REFUSED),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, REFUSED),
        ({"rope_parameters": {**LONGROPE, "rope_type": "su"}}, REFUSED),
    ],
    ("Phi3", "pad_token_id"): [({"pad_token_id": 5}, SAME), ({"pad_token_id": ...}, REFUSED)],
    ("Olmo3", "num_hidden_layers"): [({"num_hidden_layers": 3, "layer_types": None}, TAKEN)],
    ("Olmo3", "rope_parameters"): _LAYERED_ROPE,
    ("Olmo3", "sliding_window"): [
        ({"sliding_window": 16}, TAKEN),
        ({"sliding_window": 0}, REFUSED),
        ({"sliding_window": None}, REFUSED),
    ],
    ("Olmo3", "layer_types"): [
        ({"layer_types": FULL}, TAKEN),
        ({"layer_types": MIXED}, TAKEN),
        ({"layer_types": None}, TAKEN),
        ({"layer_types": FULL[:1]}, REFUSED),
        ({"layer_types": ["chunked_attention"] * 2}, REFUSED),
    ],
    ("SmolLM3", "tie_word_embeddings"): _TIED,
    ("SmolLM3", "sliding_window"): [({"sliding_window": 16}, SAME), ({"sliding_window": 0}, SAME)],
    ("SmolLM3", "use_sliding_window"): [
        ({"use_sliding_window": True, "sliding_window": 16}, SAME),
        ({"use_sliding_window": True, "sliding_window": 16, "no_rope_layers": [1, 0]}, TAKEN),
    ],
}
_WITHOUT_WINDOWS: dict[str, Cases] = {
    "sliding_window": [({"sliding_window": 16}, REFUSED)],
    "layer_types": [({"layer_types": FULL}, SAME), ({"layer_types": MIXED}, REFUSED)],
}
_HEAD_DIM: Cases = [({"head_dim": 12}, TAKEN), ({"head_dim": None}, REFUSED)]
NOT_IN_ITS_CLASS: dict[str, dict[str, Cases]] = {
    "Phi3": {
        "head_dim": _HEAD_DIM,
        "layer_types": [({"layer_types": FULL}, REFUSED)],
        "attention_bias": [({"attention_bias": True, "mlp_bias": True}, SAME)],
    },
    "Olmo2": {"head_dim": _HEAD_DIM, **_WITHOUT_WINDOWS, "mlp_bias": [({"mlp_bias": True}, SAME)]},
    "Olmo3": {"head_dim": _HEAD_DIM, "mlp_bias": [({"mlp_bias": True}, SAME)]},
    "SmolLM3": {"head_dim": _HEAD_DIM},
    "Granite": {"head_dim": _HEAD_DIM, **_WITHOUT_WINDOWS},
}
BESIDE_OTHERWISE: dict[tuple[str, str], Cases] = {
    ("Phi3", "rope_scaling"): [
        ({"rope_scaling": None, "rope_theta": 500.0}, TAKEN),
        ({"rope_scaling": LONGROPE, "rope_parameters": {"rope_theta": 7.0}}, TAKEN),
        ({"rope_scaling": {"type": "linear", "factor": 3.0}}, REFUSED),
    ],
    ("Phi3", "original_max_position_embeddings"): [({"original_max_position_embeddings": 16}, SAME)],
    ("Phi3", "partial_rotary_factor"): [
        ({"partial_rotary_factor": 1.0}, SAME),
        ({"partial_rotary_factor": 0.5}, TAKEN),
        ({"partial_rotary_factor": 0.4}, REFUSED),
        ({"partial_rotary_factor": 0.0}, REFUSED),
        ({"partial_rotary_factor": 2.0}, REFUSED),
    ],
    ("Olmo3", "rope_scaling"): [
        ({"rope_scaling": None, "rope_theta": 500.0}, TAKEN),
        ({"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "rope_theta": 500.0}, TAKEN),
        ({"rope_scaling": {**YARN, "beta_fast": 0.1}}, REFUSED),
        ({"rope_scaling": {**YARN, "attention_factor": 1.2}}, TAKEN),
        ({"rope_scaling": {**YARN, "factor": None, "beta_slow": None}}, TAKEN),
    ],
    ("Olmo3", "original_max_position_embeddings"): [
        ({"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 16}, REFUSED),
        ({"original_max_position_embeddings": 16}, SAME),
    ],
    ("SmolLM3", "attention_multiplier"): [
        ({"attention_multiplier": 2.0, "no_rope_layers": [0, 1]}, TAKEN),
    ],
    ("Granite", "attention_multiplier"): [({"no_rope_layers": [0, 1]}, SAME)],
}
