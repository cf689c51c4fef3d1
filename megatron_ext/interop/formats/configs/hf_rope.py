"""Reads the rotary-embedding settings in a config.json, with the same precedence as transformers.

Each value may be given in several places, listed in the right column. The first one that is present counts:

    rope dict, for the settings   `rope_scaling` (the name in transformers 4), `rope_parameters`
    base                          `rope_theta` in the rope dict, at the top level, 10000
    type                          `rope_type` in the rope dict, `type` in it, "default"
    original length (llama3)      `original_max_position_embeddings` at the top level, in the rope dict, the model's
                                  maximum position

Gemma 3 has two rope dicts, `full_attention` and `sliding_attention` in `rope_parameters`; the second is for layers with
a sliding window and cannot be scaled here. `rope_scaling` is merged into the first. The bases default to `rope_theta`
(1e6) and `rope_local_base_freq` (1e4) at the top level.
"""

from collections.abc import Mapping
from typing import Any

_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def read_rotary(config: Mapping[str, Any], positions: int, source: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the rotary base and scaling as field values of `ModelConfig`, and messages for the user.

    Args:
        config: content of a config.json that has passed `check_fields`.
        positions: maximum position of the model, in tokens.
        source: path of the file, for error messages.

    Raises:
        ValueError: a `ModelConfig` cannot express the rotary embedding.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = config.get(name) or {}
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{source}: {name} {nested[0]}: rotary parameters per layer type cannot be imported")
    return _read(rope, name, config, positions, source)


def read_gemma_rotary(
    config: Mapping[str, Any], positions: int, source: str, *, has_windows: bool
) -> tuple[dict[str, Any], list[str]]:
    """Returns the same for a Gemma 3 model; `has_windows` says whether any layer has a sliding window."""
    ropes: Mapping[str, Any] = config.get("rope_parameters") or {}
    unknown = sorted(set(ropes) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"{source}: rope_parameters.{unknown[0]}: must hold full_attention and sliding_attention only"
        )
    full = {**(ropes.get("full_attention") or {"rope_type": "default"}), **(config.get("rope_scaling") or {})}
    local = dict(ropes.get("sliding_attention") or {"rope_type": "default"})
    full.setdefault("rope_theta", config.get("rope_theta", 1e6))
    local.setdefault("rope_theta", config.get("rope_local_base_freq", 1e4))
    if full.get("rope_type") == "llama3" and "original_max_position_embeddings" in config:
        raise ValueError(
            f"{source}: original_max_position_embeddings: must be in rope_parameters.full_attention, where "
            "transformers reads it"
        )
    found, notes = _read(full, "rope_parameters.full_attention", config, positions, source)
    own, more = _read(local, "rope_parameters.sliding_attention", config, positions, source)
    if set(own) != {"rotary_base"}:
        raise ValueError(
            f"{source}: rope_parameters.sliding_attention: rope_type must be default; the rotary embedding of layers "
            "with a sliding window cannot be scaled"
        )
    if has_windows:
        found["rotary_base_local"] = own["rotary_base"]
    return found, [*notes, *more]


def _read(
    rope: Mapping[str, Any], name: str, config: Mapping[str, Any], positions: int, source: str
) -> tuple[dict[str, Any], list[str]]:
    """Reads one rope dict, which is called `name` in messages."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS:
        raise ValueError(f"{source}: rope scaling {kind}: only llama3, linear and default can be imported")
    for place in (rope, config):
        partial = place.get("partial_rotary_factor", 1)
        if partial != 1 and (partial is not None or place is rope):
            raise ValueError(
                f"{source}: partial_rotary_factor {partial}: must be 1; partial rotary embeddings cannot be imported"
            )
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    found: dict[str, Any] = {"rotary_base": _number("rope_theta", theta, source, least=1)}
    if kind == "linear":
        found["rotary_seq_len_interpolation_factor"] = _of(rope, "factor", kind, source)
    elif kind == "llama3":
        found |= _llama3(rope, config, positions, source)
    known = _KEYS[kind] | {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    extra = [f"{name}.{key}" for key in sorted(rope) if key not in known]
    return found, [
        f"{', '.join(extra)}: ignored, because rope scaling {kind} does not use it"
    ] if extra else []


def _llama3(
    rope: Mapping[str, Any], config: Mapping[str, Any], positions: int, source: str
) -> dict[str, Any]:
    key = "original_max_position_embeddings"
    original = config[key] if key in config else rope.get(key, positions)
    if not isinstance(original, int) or isinstance(original, bool) or original < 1:
        raise ValueError(f"{source}: {key} {original}: must be a number of at least 1")
    low, high = (_of(rope, name, "llama3", source) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ValueError(f"{source}: high_freq_factor {high}: must be above low_freq_factor {low}")
    return {
        "use_rope_scaling": True,
        "rope_scaling_factor": _of(rope, "factor", "llama3", source),
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_max_position_embeddings": original,
    }


def _of(rope: Mapping[str, Any], name: str, kind: str, source: str) -> float:
    if name not in rope:
        raise ValueError(f"{source}: rope scaling {kind}: {name} is missing")
    return _number(f"rope scaling {kind}: {name}", rope[name], source)


def _number(name: str, value: Any, source: str, *, least: float | None = None) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value <= 0 or (least is not None and value < least):
        wanted = "above 0" if least is None else f"of at least {least}"
        shown = repr(value) if isinstance(value, str) else value
        raise ValueError(f"{source}: {name} {shown}: must be a number {wanted}")
    return float(value)
