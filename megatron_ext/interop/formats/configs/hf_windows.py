"""Reads and writes the sliding windows in a config.json, the numbers of tokens that each layer attends to.

    llama, olmo2   none
    granite        none
    mistral, phi3  `sliding_window` in every layer
    gemma3_text    `sliding_window` in the layers that `layer_types` calls `sliding_attention`; without `layer_types`,
                   in all but every sixth (`sliding_window_pattern`) layer
    gemma4_text    as gemma3_text; without `layer_types`, in all but every sixth layer; never in the last layer
    gemma3n_text   as gemma3_text; without `layer_types`, in all but every fifth layer
    olmo3          as gemma3_text; without `layer_types`, in all but every fourth layer
    smollm3        `sliding_window` if `use_sliding_window`, in the layers that `layer_types` calls `sliding_attention`;
                   without `layer_types`, in the layers without rotary positions
    qwen2, qwen3   `sliding_window` if `use_sliding_window`, in the layers that `layer_types` calls `sliding_attention`;
                   without `layer_types`, from layer `max_window_layers` on

A window is the number of tokens that a token attends to, including itself; --window-size excludes the token itself.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ext.config.command_line.layer_windows import skip_frequency
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_pieces import layers_without_rotary

FIELDS = (
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "sliding_window_pattern",
)
"""Fields of a config.json that describe windows."""

Windows = tuple[int | None, ...]
"""For each layer, the number of tokens that a token attends to, including itself; None without a window."""

_DEFAULT_WINDOW = {"phi3": None, "smollm3": None, "gemma4_text": 512, "gemma3n_text": 512}
"""Window that transformers assumes if a config.json specifies none; 4096 for every other `model_type`."""

_PERIODIC = ("gemma3_text", "gemma4_text", "gemma3n_text", "olmo3")

_SLIDING, _FULL = "sliding_attention", "full_attention"
_WITHOUT = ("llama", "olmo2", "granite")
_IN_EVERY_LAYER = ("mistral", "phi3")


def read_windows(config: Mapping[str, Any], kind: str, source: str = "config.json") -> Windows:
    """Returns the window of every layer.

    Args:
        config: parsed content of the file.
        kind: model_type of the file, such as `llama`.
        source: path of the file, for error messages.

    Raises:
        ValueError: the fields contradict each other, or the windows cannot be imported.
    """
    layers: int = config["num_hidden_layers"]
    if kind in _WITHOUT:
        return _of_llama(config, kind, source)
    window: int | None = config.get("sliding_window", _DEFAULT_WINDOW.get(kind, 4096))
    if kind in _IN_EVERY_LAYER:
        if ("layer_types" in config) if kind == "mistral" else config.get("layer_types"):
            raise ValueError(
                f"{source}: layer_types of {kind} cannot be imported, because transformers "
                + (
                    "loads such a model as another model type, ministral"
                    if kind == "mistral"
                    else "applies layer_types to its cache only, not to attention"
                )
            )
        return (_at_least_one(window, source),) * layers
    types = _layer_types(config, source)
    if kind in _PERIODIC:
        if window is None:  # transformers builds a mask for the window even if no layer uses the mask
            raise ValueError(f"{source}: sliding_window null: must be a number of at least 1")
        types = types or _periodic_types(config, kind, source)
        if kind == "gemma4_text":  # as transformers does, with a warning
            types = [*types[:-1], _FULL]
    elif kind == "smollm3":
        window = window if config.get("use_sliding_window") else None
        without = layers_without_rotary(config, source)
        chosen = [_SLIDING if is_without and window is not None else _FULL for is_without in without]
        types = chosen if types is None else types
    else:
        window = window if config.get("use_sliding_window") else None
        first = config.get("max_window_layers", 28)
        suffix = [_FULL if layer < first or window is None else _SLIDING for layer in range(layers)]
        types = suffix if types is None else types
    if _SLIDING in types and window is None:
        raise ValueError(
            f"{source}: layer_types contains sliding_attention, which requires use_sliding_window true and a number "
            f"for sliding_window (got {config.get('use_sliding_window')} and {config.get('sliding_window')})"
        )
    if _SLIDING in types:
        _at_least_one(window, source)
    return tuple(window if name == _SLIDING else None for name in types)


def window_flags(windows: Windows) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` for the windows of all layers."""
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {}
    (size,) = sizes
    skip = skip_frequency(tuple(window is not None for window in windows))
    return {"window_size": f"{size - 1},0", "window_attn_skip_freq": skip}


def window_fields(model: ModelConfig, kind: str) -> dict[str, Any]:
    """Returns the fields of a config.json for a model's windows; `kind` must be able to express them."""
    if kind in _WITHOUT:
        return {}
    size = next((window for window in model.windows if window is not None), None)
    if kind in _IN_EVERY_LAYER:
        return {"sliding_window": size}
    types = [_FULL if window is None else _SLIDING for window in model.windows]
    if kind in _PERIODIC:
        return {"sliding_window": size or 4096, "layer_types": types}
    if size is None:
        return {"sliding_window": None, "use_sliding_window": False}
    return {"sliding_window": size, "use_sliding_window": True, "layer_types": types}


def expresses_windows(model: ModelConfig, kind: str) -> bool:
    """Returns whether a `model_type` can express the model's windows."""
    windows = set(model.windows)
    if kind in (*_WITHOUT, *_IN_EVERY_LAYER):
        return windows == {None} or (kind in _IN_EVERY_LAYER and None not in windows)
    return True


def _of_llama(config: Mapping[str, Any], kind: str, source: str) -> Windows:
    if config.get("sliding_window") is not None:
        # transformers' Llama ignores the window when it reads a prompt, but drops older tokens from the KV cache when
        # it generates; no model here can do both.
        raise ValueError(
            f"{source}: sliding_window {config['sliding_window']}: must be null for model_type {kind}, whose "
            "sliding windows cannot be imported"
        )
    if _SLIDING in (_layer_types(config, source) or ()):
        raise ValueError(f"{source}: layer_types: {kind} requires full_attention in every layer")
    return (None,) * int(config["num_hidden_layers"])


def _periodic_types(config: Mapping[str, Any], kind: str, source: str) -> list[str]:
    every = {"olmo3": 4, "gemma3n_text": 5}.get(kind, 6)
    if kind == "gemma3_text":
        every = config.get("sliding_window_pattern", every)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"{source}: sliding_window_pattern {every}: must be a number of at least 1")
    layers = range(config["num_hidden_layers"])
    return [_SLIDING if (layer + 1) % every else _FULL for layer in layers]


def _layer_types(config: Mapping[str, Any], source: str) -> list[str] | None:
    types: list[str] | None = config.get("layer_types")
    if types is None:
        return None
    layers, known = config["num_hidden_layers"], (_FULL, "attention", _SLIDING)
    if len(types) != layers:
        raise ValueError(
            f"{source}: layer_types has {len(types)} entries, but num_hidden_layers is {layers}; they must be equal"
        )
    for name in types:
        if name not in known:
            raise ValueError(
                f"{source}: layer_types contains {name!r}; each entry must be full_attention or sliding_attention"
            )
    return types


def _at_least_one(window: int | None, source: str) -> int | None:
    if window is not None and window < 1:
        raise ValueError(f"{source}: sliding_window {window}: must be a number of at least 1")
    return window
