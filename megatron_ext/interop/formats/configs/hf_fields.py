"""Checks the types and values of the fields of a config.json, and whether an import supports them.

Each field is of one of these kinds:

    imported         read by `hf_config`, `hf_rope`, `hf_windows` and `hf_pieces`
    without effect   does not change the model's outputs; kept for a later export
    rejected         changes the computation in a way that is not supported here
    unknown          not a field of transformers' class, which ignores it; ignored here too, with a message

Types and defaults follow the classes in transformers 5.23; a value that transformers rejects is rejected here too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_ext.interop.formats.configs.hf_defaults import DEFAULTS
from megatron_ext.interop.formats.configs.hf_gemma3n import gemma3n_values
from megatron_ext.interop.formats.configs.hf_pieces import MULTIPLIERS

_NONE = type(None)

_TYPES: dict[str, tuple[type, ...]] = {
    "vocab_size": (int,),
    "hidden_size": (int,),
    "intermediate_size": (int,),
    "num_hidden_layers": (int,),
    "num_attention_heads": (int,),
    "num_key_value_heads": (int, _NONE),
    "head_dim": (int, _NONE),
    "max_position_embeddings": (int,),
    "hidden_act": (str,),
    "rms_norm_eps": (float,),
    "initializer_range": (float,),
    "attention_dropout": (float, int),
    "tie_word_embeddings": (bool,),
    "rope_parameters": (dict, _NONE),
    "rope_scaling": (dict, _NONE),
    "use_cache": (bool,),
    "pad_token_id": (int, _NONE),
    "bos_token_id": (int, _NONE),
    "eos_token_id": (int, list, _NONE),
    "id2label": (dict, _NONE),
    "architectures": (list, _NONE),
    "dtype": (str, _NONE),
    "torch_dtype": (str, _NONE),
    "quantization_config": (dict, _NONE),
}
_WINDOW_TYPES: dict[str, tuple[type, ...]] = {
    "sliding_window": (int, _NONE),
    "use_sliding_window": (bool,),
    "max_window_layers": (int,),
    "layer_types": (list, _NONE),
}
# Fields that the class does not have, but that transformers' masks and caches read.
_NO_WINDOW_TYPES: dict[str, tuple[type, ...]] = {"layer_types": (list, _NONE), "sliding_window": (int, _NONE)}
# These classes have no head_dim, but their layers use a head_dim in the file and fail if it is null.
_HEAD: dict[str, tuple[type, ...]] = {"head_dim": (int,)}
_GEMMA: dict[str, tuple[type, ...]] = {
    "head_dim": (int,),
    "num_key_value_heads": (int,),
    "attention_bias": (bool,),
    "attention_dropout": (float, int, _NONE),
    "hidden_activation": (str,),
    "layer_types": (list, _NONE),
}
_OWN_TYPES: dict[str, dict[str, tuple[type, ...]]] = {
    "llama": {
        "attention_bias": (bool,),
        "mlp_bias": (bool,),
        "attention_dropout": (float, int, _NONE),
        "pretraining_tp": (int, _NONE),
        **_NO_WINDOW_TYPES,
    },
    "mistral": {"num_key_value_heads": (int,), "sliding_window": (int, _NONE)},
    "qwen2": {**_HEAD, **_WINDOW_TYPES},
    "qwen3": {"head_dim": (int,), "attention_bias": (bool,), **_WINDOW_TYPES},
    "gemma3_text": {
        **_GEMMA,
        "query_pre_attn_scalar": (int,),
        "sliding_window": (int, _NONE),
        "final_logit_softcapping": (float, _NONE),
        "attn_logit_softcapping": (float, _NONE),
        "use_bidirectional_attention": (bool, _NONE),
    },
    "gemma4_text": {
        **_GEMMA,
        "sliding_window": (int,),
        "final_logit_softcapping": (float, _NONE),
        "use_bidirectional_attention": (str, _NONE),
        "vocab_size_per_layer_input": (int,),
        "hidden_size_per_layer_input": (int,),
        "attention_k_eq_v": (bool,),
        "num_kv_shared_layers": (int,),
        "enable_moe_block": (bool,),
        "use_double_wide_mlp": (bool,),
        "num_experts": (int, _NONE),
        "top_k_experts": (int, _NONE),
        "moe_intermediate_size": (int, _NONE),
        "global_head_dim": (int,),
        "num_global_key_value_heads": (int, _NONE),
        "per_layer_config": (dict, _NONE),
    },
    "gemma3n_text": {
        "intermediate_size": (int, list),
        **_GEMMA,
        "sliding_window": (int,),
        "final_logit_softcapping": (float,),
        "vocab_size_per_layer_input": (int,),
        "hidden_size_per_layer_input": (int,),
        "altup_active_idx": (int,),
        "altup_coef_clip": (float,),
        "altup_correct_scale": (bool,),
        "altup_num_inputs": (int,),
        "num_kv_shared_layers": (int,),
        "laurel_rank": (int,),
        "activation_sparsity_pattern": (list, _NONE),
    },
    "phi3": {
        **_HEAD,
        **_NO_WINDOW_TYPES,
        "resid_pdrop": (float, int),
        "embd_pdrop": (float, int),
        "original_max_position_embeddings": (int,),
    },
    "olmo2": {**_HEAD, **_NO_WINDOW_TYPES, "attention_bias": (bool,)},
    "olmo3": {
        **_HEAD,
        "attention_bias": (bool,),
        "sliding_window": (int, _NONE),
        "layer_types": (list, _NONE),
    },
    "smollm3": {
        **_HEAD,
        "attention_bias": (bool,),
        "mlp_bias": (bool,),
        "use_sliding_window": (bool,),
        "sliding_window": (int, _NONE),
        "layer_types": (list, _NONE),
        "no_rope_layers": (list, _NONE),
        "no_rope_layer_interval": (int,),
    },
    "granite": {
        **_HEAD,
        **_NO_WINDOW_TYPES,
        "attention_bias": (bool,),
        "mlp_bias": (bool,),
        **dict.fromkeys(MULTIPLIERS, (float, int)),
    },
}
"""For each model_type, the types of fields that only this model_type has or that have another type elsewhere."""

_NOT_IN: dict[str, set[str]] = {
    "gemma3_text": {"hidden_act"},
    "gemma4_text": {"hidden_act", "rope_scaling"},
    "gemma3n_text": {"hidden_act"},
}
"""For each model_type, the fields of other models that its class ignores."""

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "global_head_dim",
    "num_global_key_value_heads",
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_WITHOUT_EFFECT = {
    "model_type",
    "transformers_version",
    "output_hidden_states",
    "output_attentions",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "label2id",
    "num_labels",
    "problem_type",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
    "attn_implementation",
    "_attn_implementation",
    "auto_map",
    # `hf_rope` reads and checks the following fields.
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
"""Known fields that do not change the model's outputs, or that other modules check; not checked here."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "per_layer_config": (None, {}),
    "is_causal": (True,),
    "return_dict": (True, None),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "transformers_weights": (None,),
    "configuration_files": (),
    "text_config": (None,),
    "decoder": (None,),
    "generator": (None,),
    "text_encoder": (None,),
}
"""Maps each field that transformers reads for every model to its harmless values; any other value is rejected."""

_OWN_REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gemma3_text": {"attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
    # The value "vision" affects image tokens only. transformers fails if rope_scaling is present, even as null.
    "gemma4_text": {
        "use_bidirectional_attention": (None, "vision"),
        "enable_moe_block": (False,),
        "rope_scaling": (),
        "partial_rotary_factor": (None,),
    },
    # Only altup_active_idx 0 is supported: transformers always outputs the first stream, whichever is active.
    "gemma3n_text": {"altup_active_idx": (0,), "altup_correct_scale": (True,)},
    "phi3": {"resid_pdrop": (0,)},
}
"""For each model_type, maps the fields that no other model_type has to the values that do not change the outputs."""

_OWN_WITHOUT_EFFECT = {
    "gemma3_text": {"rope_local_base_freq", "sliding_window_pattern"},
    "gemma3n_text": {"rope_local_base_freq"},
}
"""For each model_type, fields that no other model_type has and that other modules check."""


def check_fields(config: Mapping[str, Any], kind: str, source: str) -> list[str]:
    """Checks the type and value of every field of a config.json.

    Args:
        config: parsed content of the file.
        kind: model_type of the file, such as `llama`.
        source: path of the file, for error messages.

    Returns:
        Messages about ignored fields.

    Raises:
        ValueError: a field has a type or value that transformers rejects, or a value that is not supported here.
    """
    types = {name: kinds for name, kinds in _TYPES.items() if name not in _NOT_IN.get(kind, ())}
    types |= _OWN_TYPES[kind]
    refused = {name: values for name, values in _REFUSED.items() if name not in _OWN_TYPES[kind]}
    refused |= _OWN_REFUSED.get(kind, {})
    for name in _REQUIRED:
        if name not in config:
            raise ValueError(f"{source}: {name} is missing")
    for name, value in config.items():
        if name in types:
            _check_type(name, value, types[name], source)
        if name in refused and value not in refused[name]:
            raise ValueError(f"{source}: {name} {_short(value)}: {_reason(name, value)}")
    _check_values(config, kind, source)
    messages = []
    known = {*types, *refused, *_WITHOUT_EFFECT, *_OWN_WITHOUT_EFFECT.get(kind, ())}
    unknown = sorted(name for name, value in config.items() if value and name not in known)
    if unknown:
        messages.append(
            f"{', '.join(unknown)}: not a field of transformers' {kind} configuration; ignored, as in transformers"
        )
    if config.get("auto_map"):
        messages.append("auto_map: code from the directory is not run; transformers' own class is used")
    return messages


def _check_type(name: str, value: Any, types: tuple[type, ...], source: str) -> None:
    if isinstance(value, bool) and bool not in types or not isinstance(value, types):
        wanted = " or ".join("null" if kind is _NONE else kind.__name__ for kind in types)
        raise ValueError(f"{source}: {name} {_short(value)}: transformers requires {wanted}")


def _check_values(config: Mapping[str, Any], kind: str, source: str) -> None:
    for name in _COUNTS:
        value = config.get(name)
        if isinstance(value, list):
            continue  # `gemma3n_values` checks it
        least = 2 if name == "vocab_size" else 1  # a vocabulary needs at least one id, to end a document
        if value is not None and value < least:
            raise ValueError(f"{source}: {name} {value}: must be a number of at least {least}")
    epsilon, deviation = config.get("rms_norm_eps", 1e-6), config.get("initializer_range", 0.02)
    dropout = config.get("attention_dropout") or 0.0
    pad = config.get("pad_token_id", DEFAULTS[kind].pad_token)
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    for name, value, holds, wanted in (
        *_own_values(config, kind),
        ("rms_norm_eps", epsilon, lambda v: v > 0, "above 0"),
        (
            "initializer_range",
            deviation,
            lambda v: 0 < v <= (1 if kind == "llama" else v),
            "above 0, up to 1",
        ),
        ("attention_dropout", dropout, lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (
            "pad_token_id",
            pad,
            lambda v: v is None or -config["vocab_size"] <= v < config["vocab_size"],
            "an id of the vocabulary",
        ),
        ("dtype", named, lambda v: isinstance(getattr(torch, v, None), torch.dtype), "a dtype of torch"),
    ):
        if not holds(value):
            raise ValueError(f"{source}: {name} {value}: must be {wanted}")


def _own_values(config: Mapping[str, Any], kind: str) -> list[tuple[str, Any, Callable[[Any], bool], str]]:
    """Returns (name, value, condition, text of the condition) for fields that differ between models."""
    if kind not in ("gemma3_text", "gemma4_text", "gemma3n_text"):
        positive = [(name, config.get(name, 1.0), lambda v: v > 0, "above 0") for name in MULTIPLIERS]
        interval = config.get("no_rope_layer_interval", 4)
        return [
            ("hidden_act", config.get("hidden_act", "silu"), lambda v: v in ("silu", "swish"), "silu"),
            *(positive if kind == "granite" else []),
            *(
                [("no_rope_layer_interval", interval, lambda v: v > 0, "above 0")]
                if kind == "smollm3"
                else []
            ),
        ]
    tanh, limit = "gelu_pytorch_tanh", config.get("final_logit_softcapping")
    of_both: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        ("hidden_activation", config.get("hidden_activation", tanh), lambda v: v == tanh, tanh),
        ("final_logit_softcapping", limit, lambda v: v is None or v > 0, "above 0, or null"),
    ]
    if kind == "gemma3_text":
        scalar = config.get("query_pre_attn_scalar", 256)
        return [*of_both, ("query_pre_attn_scalar", scalar, lambda v: v > 0, "above 0")]
    if kind == "gemma3n_text":
        return [*of_both, *gemma3n_values(config)]
    layers, width = config["num_hidden_layers"], config.get("hidden_size_per_layer_input", 256)
    shared, rows = config.get("num_kv_shared_layers", 0), config.get("vocab_size_per_layer_input", 262144)
    return [
        *of_both,
        ("num_kv_shared_layers", shared, lambda v: 0 <= v < layers, f"at least 0 and below {layers}"),
        ("hidden_size_per_layer_input", width, lambda v: v >= 0, "at least 0"),
        (
            "vocab_size_per_layer_input",
            rows,
            lambda v: not width or v == config["vocab_size"],
            f"the vocabulary size, {config['vocab_size']}",
        ),
    ]


def _reason(name: str, value: Any) -> str:
    if name == "enable_moe_block":
        return "models with mixtures of experts cannot be imported"
    if name in ("quantization_config", "compression_config"):
        method = value.get("quant_method", "quantized") if isinstance(value, dict) else "quantized"
        return (
            f"{method} weights cannot be imported; save them dequantized with transformers "
            "(model.dequantize(), then save_pretrained())"
        )
    return "this value changes what transformers computes or reads, and cannot be imported"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
