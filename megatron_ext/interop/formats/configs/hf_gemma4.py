"""Reads and writes the config.json of a Gemma 4 text model, with per-layer embedding (E2B, E4B) or without it.

    config.json                          flag
    (always)                             --geglu, --sandwich-norm, --qk-layernorm, --v-layernorm, --softmax-scale 1
    sqrt(`hidden_size`)                  --embedding-multiplier
    `final_logit_softcapping`            --final-logit-softcapping
    `global_head_dim`                    --kv-channels-full
    `num_global_key_value_heads`         --num-query-groups-full; read only with `attention_k_eq_v`
    `attention_k_eq_v`                   --attention-k-eq-v
    `num_kv_shared_layers`               --num-kv-shared-layers
    `intermediate_size`                  --ffn-hidden-size; with `use_double_wide_mlp` --ffn-hidden-sizes, twice as wide
                                         in the layers that use keys and values of another layer
    `rope_parameters`                    --rotary-base, --rotary-base-local; --rotary-proportion for type proportional
    `hidden_size_per_layer_input`        --per-layer-preset gemma4, --per-layer-hidden-size; 0: --layer-scalar

transformers 5.23 writes sizes of heads into `per_layer_config` instead of the two `global` fields; both are read.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_ext.config.groups.model.layer_shapes import LayerShape, rotated_pairs
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_per_layer import PerLayer
from megatron_ext.interop.formats.configs.hf_pieces import is_like_gemma
from megatron_ext.interop.formats.configs.hf_rope import rope_scaling

ROPES: dict[str, dict[str, Any]] = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
"""Rotary parameters that transformers assumes if a config.json specifies none."""

_HEADS = ("head_dim", "num_key_value_heads")


def gemma4_flags(config: Mapping[str, Any], windows: tuple[int | None, ...], source: str) -> dict[str, Any]:
    """Returns Gemma 4's fields of `ModelConfig`, except those of the rotary embedding.

    Args:
        config: content of a config.json that has passed `check_fields`.
        windows: the sliding window of every layer.
        source: path of the file, for error messages.

    Raises:
        ValueError: the layers cannot have the heads that the file specifies.
    """
    shared = config.get("num_kv_shared_layers", 0)
    check_shared_layers(shared, windows, source)
    size, groups = _heads_of_full_layers(config, windows, source)
    heads = config["num_attention_heads"]
    if size % 2:
        raise ValueError(f"{source}: global_head_dim {size}: must be an even number")
    if groups is not None and heads % groups:
        raise ValueError(
            f"{source}: num_global_key_value_heads {groups}: must divide num_attention_heads {heads}"
        )
    _, proportion = plain_ropes(config, source)
    if not rotated_pairs(size, proportion):
        raise ValueError(
            f"{source}: partial_rotary_factor {proportion}: is too small to rotate any of the {size} "
            "channels of a head"
        )
    fields: dict[str, Any] = {
        "geglu": True,
        "sandwich_norm": True,
        "qk_layernorm": True,
        "v_layernorm": True,
        "softmax_scale": 1.0,
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": config.get("attention_k_eq_v", False),
        "layer_scalar": not per_layer_width(config),
    }
    if any(window is not None for window in windows):
        fields |= {"kv_channels_full": size, "num_query_groups_full": groups}
    else:
        fields |= {"kv_channels": size} | ({} if groups is None else {"num_query_groups": groups})
    if shared and config.get("use_double_wide_mlp", False):
        width, own = config["intermediate_size"], config["num_hidden_layers"] - shared
        fields |= {"ffn_hidden_size": None, "ffn_hidden_sizes": f"[{width}]*{own}+[{2 * width}]*{shared}"}
    return fields


def check_shared_layers(shared: int, windows: tuple[int | None, ...], source: str) -> None:
    """Raises `ValueError` if one of the last `shared` layers has no earlier layer of its kind."""
    first = len(windows) - shared
    if not set(windows[first:]) <= set(windows[:first]):
        raise ValueError(
            f"{source}: num_kv_shared_layers {shared}: every layer type of the last {shared} layers "
            f"must also occur in the first {first} layers, which supply the keys and values"
        )


def gemma4_per_layer(config: Mapping[str, Any]) -> PerLayer | None:
    """Returns the per-layer embedding that a config.json describes; None for a model without one."""
    width = per_layer_width(config)
    return PerLayer(preset="gemma4", width=width) if width else None


def per_layer_width(config: Mapping[str, Any]) -> int:
    """Returns the width of Gemma 4's per-layer embedding; 0 for a model without it."""
    width: int = config.get("hidden_size_per_layer_input", 256)
    return width


def _heads_of_full_layers(
    config: Mapping[str, Any], windows: tuple[int | None, ...], source: str
) -> tuple[int, int | None]:
    """Returns the size and the number of key/value heads in layers without a window. The number is None if it is the
    same in all layers.
    """
    if config.get("per_layer_config") is None:
        groups = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
        return config.get("global_head_dim", 512), groups
    full = [str(layer) for layer, window in enumerate(windows) if window is None]
    # transformers pads the layer numbers, which are the keys, with zeros to the same length.
    given = {str(key): own for key, own in config["per_layer_config"].items()}
    found = {key.lstrip("0") or "0" if key.isdecimal() else key: dict(own) for key, own in given.items()}
    if "full_attention" in found:
        found = dict.fromkeys(full, found["full_attention"]) | found
        del found["full_attention"]
    unlike = [key for key, own in found.items() if set(own) - set(_HEADS)]
    others = {tuple(own.get(name) for name in _HEADS) for own in (found.pop(key, {}) for key in full)}
    if unlike or found or len(others) > 1:
        raise ValueError(
            f"{source}: per_layer_config: must set the same head_dim and num_key_value_heads for all "
            "layers with full_attention, and nothing for other layers"
        )
    ((size, groups),) = others
    return config.get("head_dim", 256) if size is None else size, groups


def plain_ropes(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], float]:
    """Returns the rotary parameters without the type `proportional`, and the proportion of rotated channels.

    `proportional` becomes `linear` if it has a scaling factor other than 1, otherwise `default`.
    """
    ropes = dict(config.get("rope_parameters") or ROPES)
    for name in ROPES:
        if not isinstance(ropes.get(name), dict) or "rope_theta" not in ropes[name]:
            raise ValueError(
                f"{source}: rope_parameters: must have {' and '.join(ROPES)}, each with rope_theta"
            )
    full = dict(ropes["full_attention"])
    if full.get("rope_type") != "proportional":
        return {**ropes, "full_attention": full}, 1.0
    proportion, factor = full.pop("partial_rotary_factor", 1.0), full.pop("factor", 1.0)
    if isinstance(proportion, bool) or not isinstance(proportion, int | float) or not 0 < proportion <= 1:
        raise ValueError(f"{source}: partial_rotary_factor {proportion}: must lie in (0, 1]")
    full["rope_type"] = "default"
    if factor != 1.0:
        full |= {"rope_type": "linear", "factor": factor}
    return {**ropes, "full_attention": full}, float(proportion)


def expresses_gemma4(model: ModelConfig, per_layer: PerLayer | None) -> bool:
    """Returns whether Gemma 4 can express the model.

    Args:
        model: configuration of the base model.
        per_layer: the model's per-layer embedding; None without it.
    """
    norms = (
        is_like_gemma(model)
        and model.sandwich_norm
        and model.qk_layernorm
        and model.v_layernorm
        and not model.apply_layernorm_1p
    )
    multiplier = math.isclose(model.embedding_multiplier, model.hidden_size**0.5, rel_tol=1e-9)
    scalar = model.layer_scalar or per_layer is not None
    return (
        is_like_gemma(model)
        and model.geglu
        and norms
        and multiplier
        and model.softmax_scale == 1.0
        and scalar
        and model.windows[-1] is None
        and _is_double_wide(model.layers) is not None
    )


def _is_double_wide(layers: tuple[LayerShape, ...]) -> bool | None:
    """Returns whether layers that use another layer's keys have MLPs of twice the width; None if the widths
    differ in any other way.
    """
    own = {layer.ffn_hidden_size for layer in layers if layer.keys_of is None}
    others = {layer.ffn_hidden_size for layer in layers if layer.keys_of is not None}
    if len(own) > 1:
        return None
    (width,) = own
    return False if others <= {width} else True if others == {2 * width} else None


def gemma4_fields(model: ModelConfig, vocab_size: int, per_layer: PerLayer | None) -> dict[str, Any]:
    """Returns the fields of a config.json for a model for which `expresses_gemma4` is True."""
    full = model.layers[-1]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": model.layers[0].ffn_hidden_size,
        "final_logit_softcapping": model.final_logit_softcapping,
        "use_double_wide_mlp": bool(_is_double_wide(model.layers)),
        "num_kv_shared_layers": model.num_kv_shared_layers,
        "attention_k_eq_v": model.attention_k_eq_v,
        **_full_head_fields(model, full),
        "hidden_size_per_layer_input": 0 if per_layer is None else per_layer.width,
        "vocab_size_per_layer_input": vocab_size,
        "enable_moe_block": False,
        "rope_parameters": _rope_fields(model),
    }


def _full_head_fields(model: ModelConfig, full: LayerShape) -> dict[str, Any]:
    # transformers reads the number of heads only with `attention_k_eq_v`.
    if model.num_query_groups_full is None or model.attention_k_eq_v:
        return {
            "global_head_dim": full.kv_channels,
            "num_global_key_value_heads": model.num_query_groups_full,
        }
    own = {"head_dim": full.kv_channels, "num_key_value_heads": full.num_query_groups}
    layers = [str(layer) for layer, window in enumerate(model.windows) if window is None]
    return {"per_layer_config": dict.fromkeys(layers, own)}


def _rope_fields(model: ModelConfig) -> dict[str, dict[str, Any]]:
    full = {"rope_type": "default", "rope_theta": model.rotary_base, **(rope_scaling(model) or {})}
    if model.rotary_proportion != 1.0:
        full |= {"rope_type": "proportional", "partial_rotary_factor": model.rotary_proportion}
    base = model.rotary_base if model.rotary_base_local is None else model.rotary_base_local
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": base}}
