"""Writes transformers' models as GGUF files with the package's own writer, in the layout of llama.cpp's converter."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    model: Any,
    path: Path,
    *,
    quantize: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    split: int = 1,
) -> list[Path]:
    """Writes a Llama, Mistral, Qwen2, Qwen3 or Gemma 3 model; returns the paths of the `split` files.

    Args:
        model: transformers' model.
        path: the file; of a split model, the files get its name with a number.
        quantize: type of the matrices whose rows it can express; other tensors are F32.
        metadata: further entries, or other values; None leaves a key out.
        split: number of files.
    """
    config = model.config
    kind = {"mistral": "llama", "gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    files = [path] if split == 1 else [path.with_name(_numbered(path, i, split)) for i in range(split)]
    entries = _metadata(config, kind) | (metadata or {})
    tensors = list(_tensors(model, kind).items())
    for number, file in enumerate(files):
        writer = gguf.GGUFWriter(str(file), kind)
        for key, value in {**entries, **({"split.count": split} if split > 1 else {})}.items():
            _add(writer, key, value)
        for name, tensor in tensors[number::split]:
            values = tensor.float().numpy()
            fits = tensor.dim() == 2 and tensor.size(1) % gguf.GGML_QUANT_SIZES[quantize][0] == 0
            dtype = quantize if fits else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def _numbered(path: Path, number: int, count: int) -> str:
    return f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf"


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _metadata(config: Any, kind: str) -> dict[str, Any]:
    is_gemma, rope = kind == "gemma3", config.rope_parameters
    rope = rope["full_attention"] if is_gemma else rope
    found = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "context_length": config.max_position_embeddings,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window
        if config.model_type in ("mistral", "gemma3_text")
        else None,
        "final_logit_softcapping": config.final_logit_softcapping if is_gemma else None,
        "rope.freq_base": rope["rope_theta"],
    }
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    size = getattr(config, "head_dim", None)
    if size is not None:
        found |= {"attention.key_length": size, "attention.value_length": size, "rope.dimension_count": size}
    return {f"{kind}.{key}": value for key, value in found.items()}


def _tensors(model: Any, kind: str) -> dict[str, torch.Tensor]:
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        *before, part, ending = name.split(".")
        layer = f"blk.{before[2]}." if "layers" in before else ""
        if kind == "llama" and part in heads:
            size = tensor.size(0) // heads[part]
            tensor = tensor.reshape(heads[part], 2, size // 2, *tensor.shape[1:]).swapaxes(1, 2)
            tensor = tensor.reshape(model.state_dict()[name].shape)
        if kind == "gemma3" and part.endswith("norm"):
            tensor = tensor + 1
        names = GEMMA_NAMES if kind == "gemma3" else NAMES
        found[f"{layer}{names[part]}.{ending}"] = tensor.detach().contiguous()
    if kind == "gemma3":
        return found
    if model.config.rope_parameters["rope_type"] == "llama3":
        inverse = model.model.rotary_emb.inv_freq.double()
        base = model.config.rope_parameters["rope_theta"]
        size = 2 * len(inverse)
        plain = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        found["rope_freqs.weight"] = (plain / inverse).float()
    return found


def byte_level_metadata(vocab: dict[str, int], merges: list[str], pre: str) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer whose last token is the special token that ends a text."""
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }


def random_blocks(kind: gguf.GGMLQuantizationType, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Valid blocks of a quantized type with random content, [rows, bytes]; scales are finite fp16 numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(4).integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    scales = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (size - 2,)}[kind.name]
    for start in scales:
        blocks[..., start : start + 2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    return blocks.reshape(shape[0], -1)
