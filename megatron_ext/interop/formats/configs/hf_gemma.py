"""Reads and writes the fields in which a Gemma 3 text model differs from a Llama: norms, scales, activation and two
rotary bases.

    config.json                       flag
    (always)                          --geglu, --apply-layernorm-1p, --sandwich-norm, --qk-layernorm
    sqrt(`hidden_size`)               --embedding-multiplier
    1 / sqrt(`query_pre_attn_scalar`) --softmax-scale
    `final_logit_softcapping`         --final-logit-softcapping
    `rope_local_base_freq`            --rotary-base-local, see `hf_rope`
    windows                           see `hf_windows`

Attention logit softcapping (`attn_logit_softcapping`, Gemma 2) and bidirectional attention are refused by `hf_fields`.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_ext.config.groups.model.layer_shapes import LAYER_DIFFERENCES
from megatron_ext.config.groups.model_config import ModelConfig

_LOCAL_BASE = 10000.0
"""Rotary base of layers with a window that transformers assumes if a config.json specifies none."""


def gemma_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Gemma's fields of `ModelConfig` for a config.json that has passed `check_fields`."""
    return {
        "geglu": True,
        "apply_layernorm_1p": True,
        "sandwich_norm": True,
        "qk_layernorm": True,
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "softmax_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }


def expresses_gemma(model: ModelConfig) -> bool:
    """Returns whether Gemma 3 can express the model's norms, scales, activation and rotary embedding."""
    always = model.geglu and model.apply_layernorm_1p and model.sandwich_norm and model.qk_layernorm
    multiplier = math.isclose(model.embedding_multiplier, model.hidden_size**0.5, rel_tol=1e-9)
    scale = math.isclose(_scalar(model) ** -0.5, _scale(model), rel_tol=1e-9)
    has_windows = any(window is not None for window in model.windows)
    scaled = model.use_rope_scaling or model.rotary_seq_len_interpolation_factor is not None
    # Only transformers 5 has fields for scaled frequencies in layers with a window, and transformers 4 could not read
    # them.
    rotary = model.rotary_base_local is not None or not (has_windows and scaled)
    return always and multiplier and scale and rotary and not has_parts_of_gemma4(model)


def has_parts_of_gemma4(model: ModelConfig) -> bool:
    """Returns whether the model has a part that only Gemma 4 has, among all architectures."""
    differs = any(getattr(model, name) for name in LAYER_DIFFERENCES)
    return differs or model.v_layernorm or model.layer_scalar or model.rotary_proportion != 1.0


def gemma_fields(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a config.json for a model for which `expresses_gemma` is True."""
    has_windows = any(window is not None for window in model.windows)
    base = model.rotary_base if has_windows else _LOCAL_BASE
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _scalar(model),
        "final_logit_softcapping": model.final_logit_softcapping,
        "rope_local_base_freq": base if model.rotary_base_local is None else model.rotary_base_local,
    }


def _scale(model: ModelConfig) -> float:
    return model.resolved_kv_channels**-0.5 if model.softmax_scale is None else model.softmax_scale


def _scalar(model: ModelConfig) -> int:
    return max(1, round(_scale(model) ** -2))
