"""Converts the config.json of a Llama-like model to a `ModelConfig` and back; raises if that cannot be done exactly.

All supported models have RMSNorm, rotary positions, a gated MLP (SwiGLU, except for Gemma) and grouped-query attention.
Each `model_type` may have, in addition:

    llama        attention_bias: biases in q, k, v, o; mlp_bias: in gate, up, down; rope scaling `llama3`, `linear`
    mistral      a sliding window
    qwen2        biases in q, k and v; a sliding window in some layers
    qwen3        norms on queries and keys; attention_bias as in Llama; a sliding window in some layers
    gemma3_text  see `hf_gemma`
    gemma4_text  see `hf_gemma4`
    gemma3n_text see `hf_gemma3n`
    phi3         rotation of only a part of the channels; rope scaling `longrope`; a sliding window
    olmo2        norms of outputs instead of inputs, and of queries and keys over all heads; attention_bias
    olmo3        as olmo2; a sliding window in some layers
    smollm3      layers without rotary positions; a sliding window in some layers; biases as in Llama
    granite      four multipliers; biases as in Llama

All except Phi-3 may have the rope scalings `linear`, `llama3` and `yarn`; models without windows may have `dynamic`.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_defaults import DEFAULTS
from megatron_ext.interop.formats.configs.hf_fields import check_fields
from megatron_ext.interop.formats.configs.hf_gemma3n import (
    expresses_gemma3n,
    gemma3n_fields,
    gemma3n_flags,
    gemma3n_per_layer,
    has_parts_of_gemma3n,
)
from megatron_ext.interop.formats.configs.hf_gemma4 import (
    expresses_gemma4,
    gemma4_fields,
    gemma4_flags,
    gemma4_per_layer,
    plain_ropes,
)
from megatron_ext.interop.formats.configs.hf_per_layer import PerLayer
from megatron_ext.interop.formats.configs.hf_pieces import expresses_pieces, piece_fields, piece_flags
from megatron_ext.interop.formats.configs.hf_rope import (
    expresses_rotary,
    read_layered_rotary,
    read_rotary,
    rotary_fields,
)
from megatron_ext.interop.formats.configs.hf_windows import (
    FIELDS,
    Windows,
    expresses_windows,
    read_windows,
    window_fields,
    window_flags,
)

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma4ForCausalLM": "gemma4_text",
    "Gemma3nForCausalLM": "gemma3n_text",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "SmolLM3ForCausalLM": "smollm3",
    "GraniteForCausalLM": "granite",
}
"""The supported architectures: maps the name of a class in transformers to its `model_type`."""

PER_LAYER = {"gemma4": "Gemma4ForCausalLM", "gemma3n": "Gemma3nForCausalLM"}
"""Maps each --per-layer-preset that transformers can express to its architecture."""

DEFAULT_SEQUENCE_LENGTH = 4096

FUSED = ("Phi3ForCausalLM",)
"""Architectures whose files hold q, k and v in one tensor, and gate and up in another."""

_LAYERED_ROTARY = ("gemma3_text", "gemma4_text", "gemma3n_text", "olmo3")
"""Values of `model_type` with separate rotary embeddings for layers with and without a window."""

_GEMMA = ("gemma3_text", "gemma4_text", "gemma3n_text")


_EVEN_HEADS = ("llama", "gemma3_text", "gemma3n_text")
"""Values of `model_type` for which transformers requires that the number of heads divides the hidden size."""


@dataclass(frozen=True)
class HFModel:
    """The model that a config.json describes."""

    model: ModelConfig
    vocab_size: int
    architecture: str
    messages: tuple[str, ...]
    """Messages for the user about everything that could not be imported unchanged, one line each."""

    per_layer: PerLayer | None = None
    """The per-layer embedding; None for a model without it."""


def read_architecture(config: dict[str, Any], source: str) -> tuple[str, tuple[str, ...]]:
    """Returns the architecture that a config.json describes, and messages for the user.

    Like transformers, this function chooses the class by `model_type`; `architectures` only names the class that
    saved the model.

    Raises:
        ValueError: the architecture is not one of `ARCHITECTURES`.
    """
    kind, named = config.get("model_type"), config.get("architectures") or []
    if kind not in ARCHITECTURES.values():
        _check_no_experts(config, source)
    if not isinstance(named, list) or any(name not in ARCHITECTURES for name in named):
        what = ", ".join(map(str, named)) if isinstance(named, list) else named
        raise ValueError(f"{source}: architectures {what}: must be one of {', '.join(ARCHITECTURES)}")
    kinds = {model_type: name for name, model_type in ARCHITECTURES.items()}
    if kind is None and named:
        raise ValueError(
            f"{source}: model_type is missing, but transformers chooses the model by it; "
            f"for {named[0]} set it to {ARCHITECTURES[named[0]]}"
        )
    if kind not in kinds:
        raise ValueError(
            f"{source}: model_type {kind}: must be one of {', '.join(kinds)}"
            + (f" (transformers chooses the model by it, not by architectures {named[0]})" if named else "")
        )
    if named and kinds[kind] not in named:
        return kinds[kind], (
            f"imported as {kinds[kind]}, according to its model_type, and not as {named[0]}",
        )
    return kinds[kind], ()


def _check_no_experts(config: dict[str, Any], source: str) -> None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        if config.get(name):
            raise ValueError(
                f"{source}: model_type {config.get('model_type')}: is a mixture of experts ({name} {config[name]}), "
                "which cannot be imported"
            )


def to_model_config(
    config: dict[str, Any],
    source: str,
    *,
    seq_length: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
) -> HFModel:
    """Converts the content of a config.json.

    Args:
        config: parsed content of the file.
        source: path of the file, for error messages.
        seq_length: tokens per training sequence; the default is the model's maximum position, but at most 4096.
        make_vocab_size_divisible_by: the number of embedding rows is padded to a multiple of this number; the default
            is the largest power of two up to 128 that needs no padding.

    Raises:
        ValueError: a `ModelConfig` cannot express the model.
    """
    architecture, messages = read_architecture(config, source)
    kind = ARCHITECTURES[architecture]
    field_notes = check_fields(config, kind, source)
    vocab_size: int = config["vocab_size"]
    defaults = DEFAULTS[kind]
    positions: int = config.get("max_position_embeddings", defaults.positions)
    windows = read_windows(config, kind, source)
    rotary, rotary_notes = _rotary(config, kind, windows, positions, source)
    positions = rotary.get("max_position_embeddings", positions)
    if seq_length is not None and seq_length > positions:
        raise ValueError(
            f"--seq-length {seq_length}: must be at most {positions}, the maximum position in {source}"
        )
    # mcore pads the vocabulary to a multiple of a divisor; the default divisor leaves the imported embedding
    # unpadded.
    divisor = make_vocab_size_divisible_by or next(
        d for d in (128, 64, 32, 16, 8, 4, 2, 1) if vocab_size % d == 0
    )
    fields: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        **_heads(config, kind, source),
        "seq_length": seq_length or min(positions, DEFAULT_SEQUENCE_LENGTH),
        "max_position_embeddings": positions,
        **window_flags(windows),
        "norm_epsilon": config.get("rms_norm_eps", defaults.norm_epsilon),
        "swiglu": kind not in _GEMMA,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", defaults.is_tied),
        "hidden_dropout": 0.0,
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "init_method_std": config.get("initializer_range", 0.02),
        "make_vocab_size_divisible_by": divisor,
        **_biases(config, kind),
        **rotary,
        **(gemma4_flags(config, windows, source) if kind == "gemma4_text" else {}),
        **(gemma3n_flags(config, windows, source) if kind == "gemma3n_text" else {}),
        **piece_flags(config, kind, source),
    }
    messages += (*field_notes, *rotary_notes)
    of_kind = {"gemma4_text": gemma4_per_layer, "gemma3n_text": gemma3n_per_layer}
    per_layer = of_kind[kind](config) if kind in of_kind else None
    try:
        return HFModel(ModelConfig(**fields), vocab_size, architecture, messages, per_layer=per_layer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: describes a model that cannot be built ({error})") from None


def _rotary(
    config: dict[str, Any], kind: str, windows: Windows, positions: int, source: str
) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of `ModelConfig` for the rotary embedding, and messages for the user."""
    if kind not in _LAYERED_ROTARY:
        return read_rotary(config, positions, kind, source)
    proportion = 1.0
    if kind == "gemma4_text":
        ropes, proportion = plain_ropes(config, source)
        config = {**config, "rope_parameters": ropes}
    has_windows = any(window is not None for window in windows)
    fields, notes = read_layered_rotary(config, positions, kind, source, has_windows=has_windows)
    return {**fields, **({} if proportion == 1.0 else {"rotary_proportion": proportion})}, notes


def _heads(config: dict[str, Any], kind: str, source: str) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads", DEFAULTS[kind].key_value_heads)
    groups = heads if groups is None else groups
    if heads % groups:
        raise ValueError(f"{source}: num_key_value_heads {groups}: must divide num_attention_heads {heads}")
    if kind in _EVEN_HEADS and hidden % heads:
        raise ValueError(f"{source}: num_attention_heads {heads}: must divide hidden_size {hidden}")
    size = config.get("head_dim", DEFAULTS[kind].head_size)
    width = hidden // heads if size is None else size
    if width % 2 or width == 0:
        what = f"head_dim {width}" if size is not None else f"hidden_size {hidden} / {heads} heads = {width}"
        raise ValueError(f"{source}: {what}: must be an even number of at least 2")
    if hidden % heads:  # transformers rounds the head size down, so the flag must state it explicitly
        size = width
    return {"num_attention_heads": heads, "num_query_groups": groups, "kv_channels": size}


_HAVE_ATTENTION_BIAS = ("llama", "qwen3", *_GEMMA, "olmo2", "olmo3", "smollm3", "granite")
_HAVE_MLP_BIAS = ("llama", "smollm3", "granite")


def _biases(config: dict[str, Any], kind: str) -> dict[str, bool]:
    attention = kind in _HAVE_ATTENTION_BIAS and bool(config.get("attention_bias"))
    mlp = kind in _HAVE_MLP_BIAS and bool(config.get("mlp_bias"))
    if attention and mlp:
        return {"disable_bias_linear": False}
    return {
        "disable_bias_linear": True,
        "add_qkv_bias": attention or kind == "qwen2",
        "add_attention_output_bias": attention,
        "add_mlp_bias": mlp,
    }


def choose_architecture(
    model: ModelConfig, wanted: str | None = None, per_layer: PerLayer | None = None
) -> str:
    """Chooses an architecture that can express a model exactly.

    Args:
        model: configuration of the base model.
        wanted: one of `ARCHITECTURES`; None chooses the first that fits.
        per_layer: the model's per-layer embedding in the form of a Gemma model; None without one.

    Raises:
        ValueError: no architecture (or not the wanted one) can express the model; the message names the reason.
    """
    positions = model.position_embedding_type
    obstacles = (
        (f"--normalization {model.normalization}", model.normalization == "RMSNorm", "RMSNorm"),
        (f"--position-embedding-type {positions}", positions == "rope", "rope"),
        ("an MLP without a gate", model.is_gated, "--swiglu or --geglu"),
    )
    for what, fits, wanted_instead in obstacles:
        if not fits:
            raise ValueError(
                f"the model was built with {what} and cannot be exported; a Llama-like model requires {wanted_instead}"
            )
    fitting = [name for name, kind in ARCHITECTURES.items() if _fits(model, kind, per_layer)]
    if wanted is not None and wanted not in ARCHITECTURES:
        raise ValueError(f"--architecture {wanted}: must be one of {', '.join(ARCHITECTURES)}")
    if wanted is not None and wanted not in fitting:
        raise ValueError(
            f"--architecture {wanted}: cannot express this model's biases, norms, scales, positions or "
            "sliding windows" + (f"; use {' or '.join(fitting)}" if fitting else "")
        )
    if not fitting:
        raise ValueError(
            "no Llama-like architecture can express this model's combination of biases, norms, scales, positions and "
            "sliding windows"
        )
    return wanted or fitting[0]


def expresses(model: ModelConfig, architecture: str, per_layer: PerLayer | None = None) -> bool:
    """Returns whether an architecture can express a model exactly; arguments as for `choose_architecture`."""
    is_common = (
        model.normalization == "RMSNorm" and model.position_embedding_type == "rope" and model.is_gated
    )
    return is_common and _fits(model, ARCHITECTURES[architecture], per_layer)


def _fits(model: ModelConfig, kind: str, per_layer: PerLayer | None) -> bool:
    own = {"gemma4_text": expresses_gemma4, "gemma3n_text": expresses_gemma3n}
    if not (expresses_windows(model, kind) and expresses_rotary(model, kind)):
        return False
    if not (own[kind](model, per_layer) if kind in own else expresses_pieces(model, kind)):
        return False
    if (per_layer is not None and kind not in own) or (
        has_parts_of_gemma3n(model) and kind != "gemma3n_text"
    ):
        return False
    qkv, output, mlp = model.has_qkv_bias, model.has_attention_output_bias, model.has_mlp_bias
    if kind in _EVEN_HEADS and model.hidden_size % model.num_attention_heads:
        return False
    if kind == "qwen2":
        return qkv and not (output or mlp)
    if kind not in _HAVE_ATTENTION_BIAS:
        return not (qkv or output or mlp)
    return qkv == output and (not mlp or kind in _HAVE_MLP_BIAS)


_REPLACED = {
    "rope_parameters",
    "per_layer_config",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "dtype",
    "transformers_version",
    "quantization_config",
    "auto_map",
    "name_or_path",
    "_name_or_path",
    "_commit_hash",
}
"""Fields of an imported config.json that an export drops, because it writes substitutes, or because they describe the
old files.
"""


def from_model_config(
    model: ModelConfig,
    vocab_size: int,
    architecture: str,
    dtype: str,
    imported: dict[str, Any] | None = None,
    per_layer: PerLayer | None = None,
) -> dict[str, Any]:
    """Returns the content of a model's config.json, with field names that both transformers 4 and 5 read.

    Args:
        model: configuration of the base model.
        vocab_size: rows of the embedding, without padding.
        architecture: Hugging Face class from `choose_architecture`, such as `LlamaForCausalLM`.
        dtype: name of the dtype, such as `float32`.
        imported: content of the config.json that the model was imported from, or None. Fields that the export does not
            set are taken from it.
        per_layer: the model's per-layer embedding; None without it.
    """
    kind = ARCHITECTURES[architecture]
    # The default padding id of some architectures is beyond a small vocabulary.
    free = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": True}
    config = _of_model(model, vocab_size, kind, dtype, per_layer)
    if imported is None:
        return {**config, **free}
    if imported["model_type"] != kind:
        ids = {name: value for name, value in imported.items() if name in ("bos_token_id", "eos_token_id")}
        return {**config, **free, **ids}
    kept = {name: value for name, value in imported.items() if name not in _REPLACED.union(FIELDS)}
    without_effect = {"use_double_wide_mlp"} if not model.num_kv_shared_layers else set()
    without_effect |= {"vocab_size_per_layer_input"} if per_layer is None else set()
    config = {**kept, **config, **{name: kept[name] for name in without_effect & kept.keys()}}
    windows = read_windows(imported, kind)
    # An earlier version imported models without their windows, and took the shortest window as the longest position.
    shortest = min((window for window in windows if window is not None), default=None)
    is_earlier = shortest is not None and shortest == model.sliding_window
    if windows == model.windows or is_earlier:
        config = {name: value for name, value in config.items() if name not in FIELDS}
        config |= {name: imported[name] for name in FIELDS if name in imported}
    if is_earlier:
        config["max_position_embeddings"] = imported.get("max_position_embeddings", DEFAULTS[kind].positions)
    return config


def _of_model(
    model: ModelConfig, vocab_size: int, kind: str, dtype: str, per_layer: PerLayer | None
) -> dict[str, Any]:
    architecture = next(name for name, model_type in ARCHITECTURES.items() if model_type == kind)
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
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "torch_dtype": dtype,
    }
    if kind in _HAVE_ATTENTION_BIAS:
        config["attention_bias"] = model.has_qkv_bias
    if kind in _HAVE_MLP_BIAS:
        config["mlp_bias"] = model.has_mlp_bias
    if kind == "gemma3_text":
        del config["hidden_act"]
    if kind == "gemma3n_text":
        del config["hidden_act"]
        config |= rotary_fields(model, kind) | gemma3n_fields(model, per_layer)
    if kind == "gemma4_text":
        del config["hidden_act"]
        return config | gemma4_fields(model, vocab_size, per_layer) | window_fields(model, kind)
    return config | rotary_fields(model, kind) | piece_fields(model, kind) | window_fields(model, kind)
