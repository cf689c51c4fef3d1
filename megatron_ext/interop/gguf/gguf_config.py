"""Converts the metadata of a GGUF model to the content of a config.json, which `hf_config` then checks and converts.

Metadata keys begin with the architecture, for example `llama.block_count`. GGUF calls Mistral models `llama` as well.
"""

import math
from typing import Any

import numpy as np

from megatron_ext.interop.formats.configs.hf_config import ARCHITECTURES
from megatron_ext.interop.gguf.gguf_metadata import GGUFMetadata
from megatron_ext.interop.gguf.gguf_tensors import ROPE_FACTORS, GGUFTensors

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
"""Maps each GGUF architecture that can be imported to the class in transformers."""

_GEMMA_27B_LAYERS = 62
"""Number of layers by which llama.cpp recognizes Gemma 3 27B, the only Gemma 3 with another softmax scale."""

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Maps metadata keys, without their prefix (the architecture), to fields of config.json."""

_SPECIAL_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Settings of Llama 3's rotary scaling that all its models share; only the factor differs (8, or 32 in Llama 3.2)."""


def read_gguf_config(metadata: GGUFMetadata, tensors: GGUFTensors) -> dict[str, Any]:
    """Returns the content of a config.json for the model.

    Raises:
        ValueError: the architecture or one of its settings cannot be imported, or a required key is missing.
    """
    kind, place = metadata.architecture, metadata.path
    if kind not in _ARCHITECTURES:
        raise ValueError(
            f"--model-dir {place}: general.architecture {kind}: must be one of {', '.join(_ARCHITECTURES)}"
        )
    architecture = _ARCHITECTURES[kind]
    config: dict[str, Any] = {"architectures": [architecture], "model_type": ARCHITECTURES[architecture]}
    for key, field in _SIZES.items():
        config[field] = _scalar(metadata, key)
    # The file stores fp32: 1e-5 comes back as 9.999999747378752e-06.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.7g}")
    head_size = metadata.of_model(
        "attention.key_length", config["hidden_size"] // config["num_attention_heads"]
    )
    _check_head_size(metadata, head_size)
    # Without head_dim, transformers' class for qwen3 assumes 128.
    if f"{kind}.attention.key_length" in metadata or kind in ("qwen3", "gemma3"):
        config["head_dim"] = head_size
    config["vocab_size"] = tensors.shape("model.embed_tokens.weight")[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors.names
    if kind != "qwen2":  # transformers' class for qwen2 always has biases in q, k and v
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in tensors.names
    if kind == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in tensors.names
    config["rope_parameters"] = _rotary(metadata, tensors, head_size)
    for key, field in _SPECIAL_TOKENS.items():
        if f"tokenizer.ggml.{key}" in metadata:
            config[field] = metadata[f"tokenizer.ggml.{key}"]
    if kind == "gemma3":
        return config | _gemma(config, metadata)
    return config | _window(metadata)


def _gemma(config: dict[str, Any], metadata: GGUFMetadata) -> dict[str, Any]:
    """Returns the fields that only Gemma 3 has; the values of some are not in the file but in llama.cpp's code."""
    rope = config["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": metadata.of_model("rope.freq_base_swa", 10000.0)}
    limit = metadata.of_model("final_logit_softcapping", None)
    is_27b = config["num_hidden_layers"] == _GEMMA_27B_LAYERS
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return {
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        "sliding_window": metadata.require("gemma3.attention.sliding_window"),
        "query_pre_attn_scalar": scalar,
        **({} if limit is None else {"final_logit_softcapping": float(limit)}),
    }


def _check_head_size(metadata: GGUFMetadata, size: int) -> None:
    for key, what in (
        ("attention.value_length", "values of another size"),
        ("rope.dimension_count", "partial rotary embeddings"),
    ):
        if metadata.of_model(key, size) != size:
            raise ValueError(
                f"--model-dir {metadata.path}: {key} {metadata.of_model(key, size)}: must be the head size {size}; "
                f"{what} cannot be imported"
            )


def _scalar(metadata: GGUFMetadata, key: str) -> Any:
    """Returns the number stored under a key. If a file stores one number per layer, all must be equal."""
    value = metadata.require(f"{metadata.architecture}.{key}")
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise ValueError(
            f"--model-dir {metadata.path}: {key} differs from layer to layer; such models cannot be imported"
        )
    return values.pop()


def _window(metadata: GGUFMetadata) -> dict[str, Any]:
    window = metadata.of_model("attention.sliding_window", 0)
    if not window:
        return {}
    # A window under the architecture `llama` means Mistral, since transformers' Llama has no window.
    return {
        "sliding_window": window,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
    }


def _rotary(metadata: GGUFMetadata, tensors: GGUFTensors, head_dim: int) -> dict[str, Any]:
    base = metadata.of_model("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    kind = metadata.of_model("rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": metadata.of_model("rope.scaling.factor", 1.0)}
    elif kind != "none":
        raise ValueError(
            f"--model-dir {metadata.path}: rope.scaling.type {kind}: only none and linear are read"
        )
    if tensors.rope_factors is not None:
        rope |= _llama3(np.asarray(tensors.rope_factors, dtype=np.float64), base, head_dim, metadata)
    return rope


def _llama3(divisors: Any, base: float, head_dim: int, metadata: GGUFMetadata) -> dict[str, Any]:
    """Returns the settings of Llama 3's rotary scaling, for the divisors [head_dim / 2] that the file holds."""
    # The lowest frequency is divided by the whole factor.
    rope = {"rope_type": "llama3", "factor": float(divisors[-1]), **_LLAMA3}
    expected = _llama3_divisors(rope, base, head_dim)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"--model-dir {metadata.path}: {ROPE_FACTORS} does not hold the rotary scaling of a Llama 3 model"
        )
    return rope


def _llama3_divisors(rope: dict[str, Any], base: float, head_dim: int) -> Any:
    """Returns every rotary frequency's divisor, [head_dim / 2]: 1 for short wavelengths, the factor for long ones."""
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return 1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))
