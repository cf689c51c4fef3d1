"""Reads and writes features that Llama lacks: other norms, multipliers, and layers without rotary positions.

qwen3         --qk-layernorm
olmo2, olmo3  --post-norm, --qk-projection-norm
smollm3       layers without rotary positions, `no_rope_layers`: --no-rope-freq. Default: every
              `no_rope_layer_interval`-th layer
granite       `embedding_multiplier`, `attention_multiplier`, `residual_multiplier` and `logits_scaling`:
              --embedding-multiplier, --softmax-scale, --residual-multiplier and --logit-divisor
gemma3_text   see `hf_gemma`
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_ext.config.command_line.layer_windows import no_rope_frequency
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_gemma import (
    expresses_gemma,
    gemma_fields,
    gemma_flags,
    has_parts_of_gemma4,
)

_PIECES = (
    "geglu",
    "apply_layernorm_1p",
    "sandwich_norm",
    "post_norm",
    "qk_layernorm",
    "qk_projection_norm",
    "embedding_multiplier",
    "residual_multiplier",
    "logit_divisor",
    "final_logit_softcapping",
    "no_rope_freq",
)
"""Fields of `ModelConfig` that have their defaults in a Llama."""

_OLMO = {"post_norm": True, "qk_projection_norm": True}
_ALWAYS: dict[str, dict[str, Any]] = {"qwen3": {"qk_layernorm": True}, "olmo2": _OLMO, "olmo3": _OLMO}
"""For each model_type, fields of `ModelConfig` that have the same value in all its models."""

_GRANITE = {
    "embedding_multiplier": "embedding_multiplier",
    "softmax_scale": "attention_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logit_divisor": "logits_scaling",
}
_FREE = {"granite": set(_GRANITE), "smollm3": {"no_rope_freq"}}
"""For each model_type, fields that may have any value."""

MULTIPLIERS = tuple(_GRANITE.values())
"""Names of the multipliers in Granite's config.json; their defaults are 1."""


def piece_flags(config: Mapping[str, Any], kind: str, source: str) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` for the features listed at the top of this file.

    The config.json must have passed `check_fields`.

    Raises:
        ValueError: `no_rope_layers` is not a list with a 0 or 1 for every layer.
    """
    if kind == "gemma3_text":
        return gemma_flags(config)
    found = dict(_ALWAYS.get(kind, {}))
    if kind == "smollm3":
        found["no_rope_freq"] = no_rope_frequency(layers_without_rotary(config, source))
    if kind == "granite":
        found |= {ours: float(config.get(theirs, 1.0)) for ours, theirs in _GRANITE.items()}
    return found


def layers_without_rotary(config: Mapping[str, Any], source: str) -> tuple[bool, ...]:
    """Returns one boolean per layer of a SmolLM3: True if the layer has no rotary positions."""
    layers, given = config["num_hidden_layers"], config.get("no_rope_layers")
    if given is None:
        every = config.get("no_rope_layer_interval", 4)
        return tuple((layer + 1) % every == 0 for layer in range(layers))
    if len(given) < layers or any(type(uses) is not int or uses not in (0, 1) for uses in given):
        raise ValueError(
            f"{source}: no_rope_layers {str(given)[:60]}: must be 1 (with rotary positions) or 0 "
            "(without) for each of "
            f"{layers} layers"
        )
    return tuple(uses == 0 for uses in given[:layers])


def piece_fields(model: ModelConfig, kind: str) -> dict[str, Any]:
    """Returns the fields of a config.json for a model for which `expresses_pieces` is True."""
    if kind == "gemma3_text":
        return gemma_fields(model)
    if kind == "smollm3":
        return {"no_rope_layers": [int(not is_without) for is_without in model.without_rotary]}
    if kind == "granite":
        values = {theirs: getattr(model, ours) for ours, theirs in _GRANITE.items()}
        return values | {"attention_multiplier": _scale(model)}
    return {}


def expresses_pieces(model: ModelConfig, kind: str) -> bool:
    """Returns whether the model has exactly the features of a `model_type`, among those listed at the top of this
    file.
    """
    if kind == "gemma3_text":
        return expresses_gemma(model) and is_like_gemma(model)
    free, always = _FREE.get(kind, set()), _ALWAYS.get(kind, {})
    scale = math.isclose(_scale(model), model.resolved_kv_channels**-0.5, rel_tol=1e-9)
    names = tuple(name for name in _PIECES if name not in free)
    is_llama = _holds(model, names, always) and not has_parts_of_gemma4(model)
    return is_llama and (scale or "softmax_scale" in free)


def is_like_gemma(model: ModelConfig) -> bool:
    """Returns whether the model has no feature that all versions of Gemma lack, such as a residual multiplier.

    Features that only some versions have are not checked.
    """
    others = ("post_norm", "qk_projection_norm", "residual_multiplier", "logit_divisor", "no_rope_freq")
    return _holds(model, others, {})


def _holds(model: ModelConfig, names: tuple[str, ...], wanted: Mapping[str, Any]) -> bool:
    """Returns whether every named field has its value in `wanted`, or its default if `wanted` does not contain it."""
    defaults = {name: type(model).__dataclass_fields__[name].default for name in names}
    return all(getattr(model, name) == wanted.get(name, default) for name, default in defaults.items())


def _scale(model: ModelConfig) -> float:
    return model.resolved_kv_channels**-0.5 if model.softmax_scale is None else model.softmax_scale
