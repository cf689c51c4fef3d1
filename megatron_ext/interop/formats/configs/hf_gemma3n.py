"""Reads and writes the config.json of a Gemma 3n text model, which has per-layer embedding (E2B, E4B).

    config.json                          flag
    (always)                             --geglu, --sandwich-norm, --qk-layernorm, --v-layernorm, --softmax-scale 1
    sqrt(`hidden_size`)                  --embedding-multiplier
    `final_logit_softcapping`            --final-logit-softcapping
    `intermediate_size`                  --ffn-hidden-size, or --ffn-hidden-sizes for a list
    `activation_sparsity_pattern`        --mlp-activation-sparsity
    `num_kv_shared_layers`               --num-kv-shared-layers
    `laurel_rank`                        --laurel-rank
    `altup_num_inputs`                   --altup-streams
    `altup_coef_clip`                    --altup-coef-clip
    `hidden_size_per_layer_input`        --per-layer-preset gemma3n, --per-layer-hidden-size
    `vocab_size_per_layer_input`         --per-layer-vocab-size
    rotary embedding                     as for Gemma 3, see `hf_rope`
    windows                              see `hf_windows`

AltUp's active stream is the first (`altup_active_idx` 0), and its correction is scaled before it reaches the per-layer
embedding (`altup_correct_scale`); other values are refused by `hf_fields`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_ext.config.groups.model.parts_of_gemma3n import spell_list
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_gemma4 import check_shared_layers
from megatron_ext.interop.formats.configs.hf_per_layer import PerLayer

DEFAULTS: dict[str, Any] = {
    "final_logit_softcapping": 30.0,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
}
"""Values that transformers assumes for fields that a config.json lacks."""

_SPARSE_LAYERS, _SPARSITY = 10, 0.95


def gemma3n_flags(config: Mapping[str, Any], windows: tuple[int | None, ...], source: str) -> dict[str, Any]:
    """Returns Gemma 3n's fields of `ModelConfig`, except those of the rotary embedding.

    Args:
        config: content of a config.json that has passed `check_fields`.
        windows: the sliding window of every layer.
        source: path of the file, for error messages.

    Raises:
        ValueError: a layer that shares keys and values has no earlier layer of its kind to supply them.
    """
    given = {**DEFAULTS, **config}
    check_shared_layers(given["num_kv_shared_layers"], windows, source)
    layers, widths, sparse = given["num_hidden_layers"], given["intermediate_size"], sparsity_pattern(config)
    is_list = isinstance(widths, list) and len(set(widths)) > 1
    width = widths[0] if isinstance(widths, list) else widths
    assert layers == len(sparse)
    return {
        "geglu": True,
        "sandwich_norm": True,
        "qk_layernorm": True,
        "v_layernorm": True,
        "softmax_scale": 1.0,
        "embedding_multiplier": given["hidden_size"] ** 0.5,
        "final_logit_softcapping": given["final_logit_softcapping"],
        "ffn_hidden_size": None if is_list else width,
        "ffn_hidden_sizes": spell_list(widths) if is_list else None,
        "mlp_activation_sparsity": spell_list(sparse) if any(sparse) else None,
        "num_kv_shared_layers": given["num_kv_shared_layers"],
        "laurel_rank": given["laurel_rank"],
        "altup_streams": given["altup_num_inputs"],
        "altup_coef_clip": given["altup_coef_clip"],
    }


def sparsity_pattern(config: Mapping[str, Any]) -> list[float]:
    """Returns, for each layer, the fraction of the MLP's gates that are set to zero."""
    pattern, layers = config.get("activation_sparsity_pattern"), config["num_hidden_layers"]
    if pattern is None:
        sparse = _SPARSE_LAYERS if layers > _SPARSE_LAYERS else 0
        return [_SPARSITY] * sparse + [0.0] * (layers - sparse)
    return list(pattern)


def gemma3n_values(config: Mapping[str, Any]) -> list[tuple[str, Any, Callable[[Any], bool], str]]:
    """Returns (name, value, condition, text of the condition) for fields whose type has been checked."""
    given, layers = {**DEFAULTS, **config}, config["num_hidden_layers"]

    def is_list_of(kind: type, least: float, limit: float) -> Callable[[Any], bool]:
        def holds(values: list[Any]) -> bool:
            return (
                len(values) == layers
                and {type(value) for value in values} == {kind}
                and all(least <= value < limit for value in values)
            )

        return holds

    widths, sparse = config["intermediate_size"], config.get("activation_sparsity_pattern")
    found = [
        (name, given[name], lambda value: value > 0, "above 0")
        for name in ("laurel_rank", "altup_coef_clip", "hidden_size_per_layer_input")
    ]
    found += [
        ("altup_num_inputs", given["altup_num_inputs"], lambda value: value > 1, "at least 2"),
        (
            "num_kv_shared_layers",
            given["num_kv_shared_layers"],
            lambda value: 0 <= value < layers,
            f"at least 0 and below {layers}",
        ),
        (
            "vocab_size_per_layer_input",
            given["vocab_size_per_layer_input"],
            lambda value: 0 < value <= config["vocab_size"],
            f"above 0, up to the vocabulary size, {config['vocab_size']}",
        ),
    ]
    rows, pad = given["vocab_size_per_layer_input"], config.get("pad_token_id")
    found.append(
        (
            "pad_token_id",
            pad,
            lambda value: value is None or -rows <= value < rows,
            f"below {rows}, the table's rows",
        )
    )
    if isinstance(widths, list):
        wanted = f"one number of at least 1 for each of {layers} layers"
        found.append(("intermediate_size", widths, is_list_of(int, 1, math.inf), wanted))
    if sparse is not None:
        wanted = f"one number, at least 0.0 and below 1.0, for each of {layers} layers"
        found.append(("activation_sparsity_pattern", sparse, is_list_of(float, 0, 1), wanted))
    return found


def gemma3n_per_layer(config: Mapping[str, Any]) -> PerLayer:
    """Returns the per-layer embedding that a config.json describes."""
    given = {**DEFAULTS, **config}
    return PerLayer(
        preset="gemma3n",
        width=given["hidden_size_per_layer_input"],
        rows=given["vocab_size_per_layer_input"],
    )


def has_parts_of_gemma3n(model: ModelConfig) -> bool:
    """Returns whether the model has a part that only Gemma 3n has, among all architectures."""
    names = ("altup_streams", "laurel_rank", "mlp_activation_sparsity")
    return any(getattr(model, name) is not None for name in names)


def expresses_gemma3n(model: ModelConfig, per_layer: PerLayer | None) -> bool:
    """Returns whether Gemma 3n can express the model.

    Args:
        model: configuration of the base model.
        per_layer: the model's per-layer embedding; None without it.
    """
    needed = ("altup_streams", "altup_coef_clip", "laurel_rank", "final_logit_softcapping")
    norms = model.sandwich_norm and model.qk_layernorm and model.v_layernorm and not model.apply_layernorm_1p
    other = ("kv_channels_full", "num_query_groups_full", "attention_k_eq_v", "layer_scalar")
    has_windows = any(window is not None for window in model.windows)
    scaled = model.use_rope_scaling or model.rotary_seq_len_interpolation_factor is not None
    return (
        per_layer is not None
        and per_layer.preset == "gemma3n"
        and model.geglu
        and norms
        and all(getattr(model, name) is not None for name in needed)
        and not any(getattr(model, name) for name in other)
        and model.rotary_proportion == 1.0
        and model.softmax_scale == 1.0
        and math.isclose(model.embedding_multiplier, model.hidden_size**0.5, rel_tol=1e-9)
        and (model.rotary_base_local is not None or not (has_windows and scaled))
    )


def gemma3n_fields(model: ModelConfig, per_layer: PerLayer | None) -> dict[str, Any]:
    """Returns the fields of a config.json for a model for which `expresses_gemma3n` is True; same arguments."""
    assert per_layer is not None
    local = model.rotary_base if model.rotary_base_local is None else model.rotary_base_local
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "intermediate_size": [layer.ffn_hidden_size for layer in model.layers],
        "final_logit_softcapping": model.final_logit_softcapping,
        "rope_local_base_freq": local,
        "activation_sparsity_pattern": [float(layer.sparsity) for layer in model.layers],
        "num_kv_shared_layers": model.num_kv_shared_layers,
        "laurel_rank": model.laurel_rank,
        "altup_num_inputs": model.altup_streams,
        "altup_coef_clip": model.altup_coef_clip,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "hidden_size_per_layer_input": per_layer.width,
        "vocab_size_per_layer_input": per_layer.rows,
    }
