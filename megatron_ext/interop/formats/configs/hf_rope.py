"""Reads and writes the rotary-embedding settings in a config.json, with the same precedence as transformers.

Each value may be given in several places, listed in the right column. The first one that is present counts:

    rope dict, for the settings   `rope_scaling` (the name in transformers 4), `rope_parameters`
    base                          `rope_theta` in the rope dict, at the top level, the model_type's default
    type                          `rope_type` in the rope dict, `type` in it, "default"
    original length               `original_max_position_embeddings` at the top level, in the rope dict, the model's
                                  maximum position; for Phi-3, the top level only
    rotated fraction (Phi-3)      `partial_rotary_factor` in the rope dict, at the top level, 1

Gemma 3 and OLMo 3 have two rope dicts, `full_attention` and `sliding_attention` in `rope_parameters`; the second is for
layers with a sliding window and cannot be scaled here. `rope_scaling` is merged into the first. The bases default to
`rope_theta` and, for layers with a window, `rope_local_base_freq` (Gemma 3, 3n) or 5e5 (OLMo 3).

The formulas of the rope scalings are in `models.ops.positions.rope_scaling`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_defaults import DEFAULTS
from megatron_ext.models.ops.positions.rope_scaling import yarn_scale

_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "dynamic": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    },
}
_OF_PHI3 = ("default", "longrope")
_LOCAL_BASE = {"gemma3_text": 1e4, "gemma4_text": 1e4, "gemma3n_text": 1e4, "olmo3": 5e5}
"""For each model_type, the base that transformers assumes for layers with a window if a config.json specifies
none.
"""

_HAVE_LOCAL_BASE = ("gemma3_text", "gemma3n_text")

Rotary = tuple[dict[str, Any], list[str]]
"""Fields of `ModelConfig`, and messages for the user."""


def read_rotary(config: Mapping[str, Any], positions: int, kind: str, source: str) -> Rotary:
    """Returns the rotary base and scaling.

    Args:
        config: content of a config.json that has passed `check_fields`.
        positions: maximum position of the model, in tokens.
        kind: model_type of the file, such as `llama`.
        source: path of the file, for error messages.

    Raises:
        ValueError: a `ModelConfig` cannot express the rotary embedding.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = config.get(name) or {}
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"{source}: {name} {nested[0]}: rotary parameters per layer type cannot be imported")
    return _Reader(rope, name, config, positions, kind, source).read()


def read_layered_rotary(
    config: Mapping[str, Any], positions: int, kind: str, source: str, *, has_windows: bool
) -> Rotary:
    """Like `read_rotary`, for a model with separate rotary embeddings for layers with and without a window;
    `has_windows` is True if any layer has a sliding window.
    """
    ropes: Mapping[str, Any] = config.get("rope_parameters") or {}
    unknown = sorted(set(ropes) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"{source}: rope_parameters.{unknown[0]}: unknown; rope_parameters must hold full_attention and "
            "sliding_attention only"
        )
    full = {**(ropes.get("full_attention") or {"rope_type": "default"}), **(config.get("rope_scaling") or {})}
    local = dict(ropes.get("sliding_attention") or {"rope_type": "default"})
    full.setdefault("rope_theta", config.get("rope_theta", DEFAULTS[kind].rotary_base))
    local_base = config.get("rope_local_base_freq") if kind in _HAVE_LOCAL_BASE else None
    local.setdefault("rope_theta", _LOCAL_BASE[kind] if local_base is None else local_base)
    original = "original_max_position_embeddings"
    if full.get("rope_type", full.get("type")) in ("llama3", "yarn") and original in config:
        raise ValueError(
            f"{source}: {original}: must be in rope_parameters.full_attention, where transformers reads it"
        )
    place = "rope_parameters.full_attention"
    found, notes = _Reader(full, place, config, positions, kind, source).read()
    if found.get("rope_scaling_type") == "dynamic":
        raise ValueError(f"{source}: {place}: rope scaling dynamic cannot be imported for {kind}")
    place = "rope_parameters.sliding_attention"
    own, more = _Reader(local, place, config, positions, kind, source).read()
    if set(own) != {"rotary_base"}:
        raise ValueError(
            f"{source}: {place}: rope_type must be default; the rotary embedding of layers with a sliding window "
            "cannot be scaled"
        )
    if has_windows and (kind != "olmo3" or own != found):
        found["rotary_base_local"] = own["rotary_base"]
    return found, [*notes, *more]


class _Reader:
    """Reads one rope dict, which error messages call `name`. The other arguments are those of `read_rotary`."""

    def __init__(
        self,
        rope: Mapping[str, Any],
        name: str,
        config: Mapping[str, Any],
        positions: int,
        kind: str,
        source: str,
    ) -> None:
        self.rope, self.name, self.config, self.source = rope, name, config, source
        self.positions, self.kind = positions, kind
        self.type: str = rope.get("rope_type", rope.get("type", "default"))

    def read(self) -> Rotary:
        known = _OF_PHI3 if self.kind == "phi3" else tuple(name for name in _KEYS if name != "longrope")
        if self.type not in known:
            raise ValueError(
                f"{self.source}: rope scaling {self.type}: only {', '.join(known)} can be imported for {self.kind}"
            )
        base = self.rope.get("rope_theta", self.config.get("rope_theta", DEFAULTS[self.kind].rotary_base))
        found: dict[str, Any] = {"rotary_base": _number("rope_theta", base, self.source, least=1)}
        readers: dict[str, Callable[[], dict[str, Any]]] = {
            "linear": lambda: {"rotary_seq_len_interpolation_factor": self._of("factor")},
            "llama3": self._llama3,
            "dynamic": self._dynamic,
            "yarn": self._yarn,
            "longrope": self._longrope,
        }
        if self.type in readers:
            found |= readers[self.type]()
        found |= self._rotated_share()
        used = _KEYS[self.type] | {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
        extra = ", ".join(f"{self.name}.{key}" for key in sorted(self.rope) if key not in used)
        note = f"{extra}: ignored, because rope scaling {self.type} does not use it"
        return found, [note] if extra else []

    def _rotated_share(self) -> dict[str, Any]:
        """Returns the field of `ModelConfig` for `partial_rotary_factor`; empty if the factor is 1."""
        if self.kind == "phi3":
            share = self.rope.get("partial_rotary_factor", self.config.get("partial_rotary_factor", 1.0))
            if share == 1 and not isinstance(share, bool):
                return {}
            head = self._head_size()
            is_number = isinstance(share, int | float) and not isinstance(share, bool)
            if not is_number or not 0 < share <= 1 or int(head * share) % 2 or int(head * share) == 0:
                raise ValueError(
                    f"{self.source}: partial_rotary_factor {share}: must lie in (0, 1] and must rotate "
                    f"an even number of a head's {head} channels"
                )
            return {"rotary_percent": float(share)}
        for place in (self.rope, self.config):
            share = place.get("partial_rotary_factor", 1)
            if share != 1 and (share is not None or place is self.rope):
                raise ValueError(
                    f"{self.source}: partial_rotary_factor {share}: must be 1; partial rotary embeddings can be "
                    "imported for phi3 only"
                )
        return {}

    def _head_size(self) -> int:
        size: int = self.config.get(
            "head_dim", self.config["hidden_size"] // self.config["num_attention_heads"]
        )
        return size

    def _llama3(self) -> dict[str, Any]:
        low, high = self._of("low_freq_factor"), self._of("high_freq_factor")
        if high <= low:
            raise ValueError(f"{self.source}: high_freq_factor {high}: must be above low_freq_factor {low}")
        return {
            "use_rope_scaling": True,
            "rope_scaling_factor": self._of("factor"),
            "rope_low_freq_factor": low,
            "rope_high_freq_factor": high,
            "rope_original_max_position_embeddings": self._original(),
        }

    def _dynamic(self) -> dict[str, Any]:
        factor = self._of("factor")
        return {
            "use_rope_scaling": True,
            "rope_scaling_type": "dynamic",
            "rope_scaling_factor": factor,
            "rope_original_max_position_embeddings": self.positions,
            "max_position_embeddings": max(self.positions, int(self.positions * factor)),
        }

    def _yarn(self) -> dict[str, Any]:
        if self.rope.get("truncate", True) is not True:
            raise ValueError(
                f"{self.source}: rope scaling yarn: truncate {self.rope['truncate']}: must be true"
            )
        original = self._original()
        factor = self._factor(original)
        slow, fast = (
            self._optional(key, 0) or default for key, default in (("beta_slow", 1.0), ("beta_fast", 32.0))
        )
        if fast <= slow:
            raise ValueError(
                f"{self.source}: rope scaling yarn: beta_fast {fast}: must be above beta_slow {slow}"
            )
        attention = self._optional("attention_factor")
        scale, of_all = (self._optional(key, 0) for key in ("mscale", "mscale_all_dim"))
        if attention is None and scale and of_all:
            attention = yarn_scale(factor, scale) / yarn_scale(factor, of_all)
        return {
            "use_rope_scaling": True,
            "rope_scaling_type": "yarn",
            "rope_scaling_factor": factor,
            "rope_low_freq_factor": slow,
            "rope_high_freq_factor": fast,
            "rope_original_max_position_embeddings": original,
            **({} if attention is None else {"rope_attention_factor": attention}),
        }

    def _longrope(self) -> dict[str, Any]:
        original = self.config.get("original_max_position_embeddings", DEFAULTS[self.kind].positions)
        if self._head_size() != self.config["hidden_size"] // self.config["num_attention_heads"]:
            raise ValueError(
                f"{self.source}: head_dim {self._head_size()}: must be hidden_size / num_attention_heads with rope "
                "scaling longrope"
            )
        if original < 2:
            raise ValueError(
                f"{self.source}: original_max_position_embeddings {original}: must be at least 2"
            )
        attention = self._optional("attention_factor")
        return {
            "use_rope_scaling": True,
            "rope_scaling_type": "longrope",
            "rope_scaling_factor": self._factor(original, is_required=False),
            "rope_original_max_position_embeddings": original,
            "rope_short_factors": self._numbers("short_factor"),
            "rope_long_factors": self._numbers("long_factor"),
            **({} if attention is None else {"rope_attention_factor": attention}),
        }

    def _factor(self, original: int, *, is_required: bool = True) -> float:
        """Returns `factor`; if it is null, the ratio of the longest position to the original length."""
        if self.rope.get("factor", ... if is_required else None) is None:
            return self.positions / original
        return self._of("factor")

    def _original(self) -> int:
        key = "original_max_position_embeddings"
        original = self.config[key] if key in self.config else self.rope.get(key, self.positions)
        if not isinstance(original, int) or isinstance(original, bool) or original < 1:
            raise ValueError(f"{self.source}: {key} {original}: must be a number of at least 1")
        return original

    def _numbers(self, key: str) -> tuple[float, ...]:
        found = self.rope.get(key)
        pairs = int(self._head_size() * self._rotated_share().get("rotary_percent", 1.0)) // 2
        if not isinstance(found, list) or len(found) != pairs:
            raise ValueError(
                f"{self.source}: rope scaling longrope: {key}: must be a list of {pairs} numbers"
            )
        return tuple(_number(f"rope scaling longrope: {key}", value, self.source) for value in found)

    def _optional(self, key: str, harmless: float | None = None) -> float | None:
        value = self.rope.get(key)
        if value is None or (value == harmless and not isinstance(value, bool)):
            return None
        return self._of(key)

    def _of(self, key: str) -> float:
        if key not in self.rope:
            raise ValueError(f"{self.source}: rope scaling {self.type}: {key} is missing")
        return _number(f"rope scaling {self.type}: {key}", self.rope[key], self.source)


def _number(name: str, value: Any, source: str, *, least: float | None = None) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value <= 0 or (least is not None and value < least):
        wanted = "above 0" if least is None else f"of at least {least}"
        shown = repr(value) if isinstance(value, str) else value
        raise ValueError(f"{source}: {name} {shown}: must be a number {wanted}")
    return float(value)


def expresses_rotary(model: ModelConfig, kind: str) -> bool:
    """Returns whether a `model_type` can express the model's rotary base, rotated fraction and scaling."""
    is_layered = kind in _LOCAL_BASE
    if model.rotary_base_local not in (None, model.rotary_base) and not is_layered:
        return False
    is_linear = model.rotary_seq_len_interpolation_factor is not None
    scaling = model.rope_scaling_type if model.use_rope_scaling else "linear" if is_linear else "default"
    if kind == "phi3":
        has_own_size = model.resolved_kv_channels != model.hidden_size // model.num_attention_heads
        return scaling == "default" or (scaling == "longrope" and not has_own_size)
    has_windows = any(window is not None for window in model.windows)
    if is_layered and has_windows and scaling != "default" and model.rotary_base_local is None:
        return False  # Scaled frequencies in layers with a window cannot be imported again.
    return scaling not in ("longrope", *(["dynamic"] if is_layered else [])) and model.rotary_percent == 1.0


def rotary_fields(model: ModelConfig, kind: str) -> dict[str, Any]:
    """Returns the fields of a config.json for a model for which `expresses_rotary` is True."""
    scaling = rope_scaling(model)
    fields: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_scaling": scaling}
    if kind == "phi3":
        fields["partial_rotary_factor"] = model.rotary_percent
        if scaling is not None:
            fields["original_max_position_embeddings"] = model.rope_original_max_position_embeddings
    if model.use_rope_scaling and model.rope_scaling_type == "dynamic":
        fields["max_position_embeddings"] = model.rope_original_max_position_embeddings
    if kind == "olmo3":
        # transformers 4 has one base for all layers, and reads only the fields above.
        base = model.rotary_base if model.rotary_base_local is None else model.rotary_base_local
        fields["rope_parameters"] = {
            "full_attention": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rotary_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": base},
        }
    return fields


def rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    """Returns the rope dict for the scaling of the model's frequencies; None without scaling."""
    if model.rotary_seq_len_interpolation_factor is not None:
        return {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
    if not model.use_rope_scaling:
        return None
    found: dict[str, Any] = {"rope_type": model.rope_scaling_type, "factor": model.rope_scaling_factor}
    if model.rope_scaling_type == "dynamic":
        return found
    found["original_max_position_embeddings"] = model.rope_original_max_position_embeddings
    if model.rope_attention_factor is not None:
        found["attention_factor"] = model.rope_attention_factor
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    of_type: dict[str, dict[str, Any]] = {
        "llama3": {"low_freq_factor": low, "high_freq_factor": high},
        "yarn": {"beta_slow": low, "beta_fast": high},
        "longrope": {
            "short_factor": list(model.rope_short_factors),
            "long_factor": list(model.rope_long_factors),
        },
    }
    return found | of_type[model.rope_scaling_type]
