"""A Llama-family config.json as a `ModelConfig`, and back. What cannot be expressed exactly is an error of one line.

    model_type   beyond Llama's RMSNorm, rotary positions, SwiGLU and grouped-query attention
    llama        attention_bias: biases in q, k, v, o; mlp_bias: in gate, up, down; rope scaling `llama3`, `linear`
    mistral      a sliding window
    qwen2        biases in q, k and v
    qwen3        norms on queries and keys; attention_bias as in Llama

Attention here looks at everything before a token. A model with a sliding window does the same on sequences up to the
window, so it is imported for those: its longest position becomes the window, and whatever would go past it is refused.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ext.config.model import ModelConfig

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architecture -> model_type of the models that can be imported and exported."""

DEFAULT_SEQUENCE_LENGTH = 4096

# Values of Hugging Face's classes where a config.json leaves a field out; they differ between models.
_DEFAULT_HEAD_SIZE = {"qwen3": 128}
_DEFAULT_KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


@dataclass(frozen=True)
class Source:
    """What a config.json says, in our terms."""

    model: ModelConfig
    vocab_size: int
    architecture: str
    notes: tuple[str, ...]
    """For the user: what is not taken over as it stands."""


def read_architecture(config: dict[str, Any], source: str) -> str:
    """The architecture of a config.json.

    Raises:
        ValueError: none that can be imported.
    """
    named = config.get("architectures") or []
    if not named:
        named = [name for name, kind in ARCHITECTURES.items() if kind == config.get("model_type")]
    if len(named) != 1 or named[0] not in ARCHITECTURES:
        what = ", ".join(map(str, named)) or f"model_type {config.get('model_type')}"
        raise ValueError(f"{source}: unknown architecture {what}, must be one of {', '.join(ARCHITECTURES)}")
    return named[0]


def to_model_config(
    config: dict[str, Any],
    source: str,
    *,
    seq_length: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
) -> Source:
    """What a config.json describes.

    Args:
        config: the file's content.
        source: the file, named in errors.
        seq_length: tokens of a training sequence; by default the longest position, at most 4096.
        make_vocab_size_divisible_by: by default the greatest power of two up to 128 that leaves nothing to pad.

    Raises:
        ValueError: the model cannot be expressed.
    """
    architecture = read_architecture(config, source)
    kind = ARCHITECTURES[architecture]
    _refuse_unknown(config, source)
    vocab_size = _integer(config, "vocab_size", source)
    positions, notes = _longest_position(config, kind, source)
    if seq_length is not None and seq_length > positions:
        raise ValueError(
            f"--seq-length {seq_length}: {source} describes a model for up to {positions} tokens"
        )
    divisor = make_vocab_size_divisible_by or next(
        d for d in (128, 64, 32, 16, 8, 4, 2, 1) if vocab_size % d == 0
    )
    heads = _integer(config, "num_attention_heads", source)
    groups = config.get("num_key_value_heads", _DEFAULT_KEY_VALUE_HEADS.get(kind))
    fields: dict[str, Any] = {
        "num_layers": _integer(config, "num_hidden_layers", source),
        "hidden_size": _integer(config, "hidden_size", source),
        "ffn_hidden_size": _integer(config, "intermediate_size", source),
        "num_attention_heads": heads,
        "num_query_groups": heads if groups is None else groups,
        "kv_channels": config.get("head_dim") or _DEFAULT_HEAD_SIZE.get(kind),
        "seq_length": seq_length or min(positions, DEFAULT_SEQUENCE_LENGTH),
        "max_position_embeddings": positions,
        "sliding_window": positions if notes else None,
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "swiglu": True,
        "qk_layernorm": kind == "qwen3",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "hidden_dropout": 0.0,
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "init_method_std": config.get("initializer_range", 0.02),
        "make_vocab_size_divisible_by": divisor,
        **_biases(config, kind),
        **_rotary(config, positions, source),
    }
    try:
        return Source(ModelConfig(**fields), vocab_size, architecture, notes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: describes no model that can be built ({error})") from None


def _refuse_unknown(config: dict[str, Any], source: str) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{source}: hidden_act {config['hidden_act']}: only silu can be imported")
    if config.get("quantization_config"):
        raise ValueError(f"{source}: quantization_config: quantized weights cannot be imported")


def _integer(config: dict[str, Any], name: str, source: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{source}: {name} {value}: must be a number of at least 1")
    return value


def _longest_position(config: dict[str, Any], kind: str, source: str) -> tuple[int, tuple[str, ...]]:
    positions = config.get("max_position_embeddings", _DEFAULT_POSITIONS[kind])
    if not isinstance(positions, int) or positions < 1:
        raise ValueError(f"{source}: max_position_embeddings {positions}: must be a number of at least 1")
    window = sliding_window(config, kind)
    if window is None or window >= positions:
        return positions, ()
    note = (
        f"sliding window {window}: attention here has no window, which is the same for sequences up to {window} "
        "tokens; the model is imported for those"
    )
    return window, (note,)


def sliding_window(config: dict[str, Any], kind: str) -> int | None:
    """Tokens that an attention layer of a config.json looks back, None for all."""
    if kind == "mistral":
        return config.get("sliding_window", 4096)
    if kind.startswith("qwen") and config.get("use_sliding_window"):
        return config.get("sliding_window", 4096)
    return None


def _biases(config: dict[str, Any], kind: str) -> dict[str, bool]:
    attention = kind in ("llama", "qwen3") and bool(config.get("attention_bias"))
    mlp = kind == "llama" and bool(config.get("mlp_bias"))
    if attention and mlp:
        return {"disable_bias_linear": False}
    return {
        "disable_bias_linear": True,
        "add_qkv_bias": attention or kind == "qwen2",
        "add_attention_output_bias": attention,
        "add_mlp_bias": mlp,
    }


def _rotary(config: dict[str, Any], positions: int, source: str) -> dict[str, Any]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"{source}: partial_rotary_factor {partial}: only whole heads can be rotated")
    try:
        found: dict[str, Any] = {"rotary_base": float(theta)}
        if kind == "linear":
            found["rotary_seq_len_interpolation_factor"] = float(rope["factor"])
        elif kind == "llama3":
            original = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
            found |= {
                "use_rope_scaling": True,
                "rope_scaling_factor": float(rope["factor"]),
                "rope_low_freq_factor": float(rope["low_freq_factor"]),
                "rope_high_freq_factor": float(rope["high_freq_factor"]),
                "rope_original_max_position_embeddings": int(original or positions),
            }
        elif kind != "default":
            raise ValueError(
                f"{source}: rope scaling {kind}: only llama3, linear and default can be imported"
            )
    except KeyError as error:
        raise ValueError(f"{source}: rope scaling {kind}: {error.args[0]} is missing") from None
    except TypeError:
        raise ValueError(f"{source}: rope scaling {rope}: not numbers") from None
    return found


def choose_architecture(model: ModelConfig, wanted: str | None = None) -> str:
    """The architecture that expresses a model exactly.

    Args:
        model: the base model.
        wanted: an architecture of `ARCHITECTURES`, or None for the first that does.

    Raises:
        ValueError: there is none, or not the wanted one; it names the flag that stands in the way.
    """
    obstacles = {
        "--normalization": (model.normalization, "RMSNorm"),
        "--position-embedding-type": (model.position_embedding_type, "rope"),
        "--rotary-percent": (model.rotary_percent, 1.0),
        "--swiglu": (model.swiglu, True),
    }
    for flag, (ours, theirs) in obstacles.items():
        if ours != theirs:
            raise ValueError(
                f"{flag} {ours}: a Llama-family model has {theirs}, so this one cannot be exported"
            )
    fitting = [name for name, kind in ARCHITECTURES.items() if _fits(model, kind)]
    if wanted is not None and wanted not in ARCHITECTURES:
        raise ValueError(f"--architecture {wanted}: must be one of {', '.join(ARCHITECTURES)}")
    if wanted is not None and wanted not in fitting:
        raise ValueError(
            f"--architecture {wanted}: does not have this model's biases or query and key norms"
            + (f"; {', '.join(fitting)} does" if fitting else "")
        )
    if not fitting:
        raise ValueError(
            "no Llama-family model has this model's combination of biases and query and key norms"
        )
    return wanted or fitting[0]


def _fits(model: ModelConfig, kind: str) -> bool:
    qkv, output, mlp = model.has_qkv_bias, model.has_attention_output_bias, model.has_mlp_bias
    if kind == "llama":
        return qkv == output and not model.qk_layernorm
    if kind == "mistral":
        return not (qkv or output or mlp or model.qk_layernorm)
    if kind == "qwen2":
        return qkv and not (output or mlp or model.qk_layernorm)
    return qkv == output and not mlp and model.qk_layernorm


def from_model_config(model: ModelConfig, vocab_size: int, architecture: str, dtype: str) -> dict[str, Any]:
    """The config.json of a model, in the words that both transformers 4 and 5 read.

    Args:
        model: the base model.
        vocab_size: rows of the embedding, without padding.
        architecture: as `choose_architecture` gave it.
        dtype: as in `float32`.
    """
    kind = ARCHITECTURES[architecture]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.resolved_ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.resolved_num_query_groups,
        "head_dim": model.resolved_kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.resolved_max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": _rope_scaling(model),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = model.has_qkv_bias
    if kind == "llama":
        config["mlp_bias"] = model.has_mlp_bias
    if kind != "llama":
        config["sliding_window"] = None
    if kind.startswith("qwen"):
        config["use_sliding_window"] = False
    return config


def _rope_scaling(model: ModelConfig) -> dict[str, Any] | None:
    if model.rotary_seq_len_interpolation_factor is not None:
        return {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
    if not model.use_rope_scaling:
        return None
    return {
        "rope_type": "llama3",
        "factor": model.rope_scaling_factor,
        "low_freq_factor": model.rope_low_freq_factor,
        "high_freq_factor": model.rope_high_freq_factor,
        "original_max_position_embeddings": model.rope_original_max_position_embeddings,
    }
