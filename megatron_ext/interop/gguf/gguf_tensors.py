"""Reads the tensors of a GGUF model under their Hugging Face names; a tensor is dequantized when it is read.

Two architectures store values differently from transformers. In `llama` files, the rows of the query and key
projections alternate, within a head, between the two halves that the rotary embedding pairs; transformers stores one
half after the other. `gemma3` files contain the weights of norms; transformers stores these weights minus 1.
"""

import re

import torch

from megatron_ext.interop.formats.weight_layout import Shape
from megatron_ext.interop.gguf.gguf_metadata import GGUFMetadata

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor with a divisor for every rotary frequency, in files of models with Llama 3's rotary scaling."""

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Supported tensor types; a file usually contains several."""

_GLOBAL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IN_GEMMA_LAYER = {
    **_IN_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFTensors:
    """The tensors of a GGUF model by their Hugging Face names; implements `TensorFiles`.

    Args:
        metadata: the opened model.

    Raises:
        ValueError: the file holds a tensor that no supported model has, or a tensor of an unsupported type.
    """

    described_in = "its metadata"

    def __init__(self, metadata: GGUFMetadata) -> None:
        self.folder = metadata.path
        self._heads = {
            "q_proj": metadata.of_model("attention.head_count", None),
            "k_proj": metadata.of_model("attention.head_count_kv", None),
        }
        self._interleaves = metadata.architecture == "llama"
        self._is_gemma = metadata.architecture == "gemma3"
        stored = [tensor for reader in metadata.readers for tensor in reader.tensors]
        factors = [tensor.data for tensor in stored if tensor.name == ROPE_FACTORS]
        self.rope_factors = factors[0] if factors else None
        """The tensor `ROPE_FACTORS`, [head size / 2], or None if the file has none."""
        self._tensors = {self._name(tensor.name): tensor for tensor in stored if tensor.name != ROPE_FACTORS}
        unread = sorted({tensor.tensor_type.name for tensor in stored} - set(SUPPORTED))
        if unread:
            raise ValueError(
                f"--model-dir {self.folder}: holds tensors of type {', '.join(unread)}; "
                f"only {', '.join(SUPPORTED)} are read"
            )

    def _name(self, stored: str) -> str:
        """Converts the name of a tensor in the file to its Hugging Face name."""
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", stored)
        in_layer = _IN_GEMMA_LAYER if self._is_gemma else _IN_LAYER
        table = _GLOBAL if match is None or match[1] is None else in_layer
        if match is None or match[2] not in table:
            raise ValueError(
                f"--model-dir {self.folder}: tensor {stored} belongs to a model that cannot be imported"
            )
        layer = "" if match[1] is None else f"model.layers.{match[1]}."
        return f"{layer}{table[match[2]]}.{match[3]}"

    @property
    def names(self) -> set[str]:
        return set(self._tensors)

    @property
    def types(self) -> list[str]:
        """Types of the tensors in the file, such as Q4_1, sorted."""
        return sorted({tensor.tensor_type.name for tensor in self._tensors.values()})

    @property
    def messages(self) -> list[str]:
        """Messages for the user about tensors that are converted when they are read, one line each."""
        types = [kind for kind in self.types if kind not in ("F32", "F16", "BF16")]
        return [f"{', '.join(types)} tensors are dequantized to fp32"] if types else []

    def shape(self, name: str) -> Shape:
        """Returns the shape of a tensor, from the file's header."""
        # GGUF lists the dimension that is contiguous in memory first.
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which `read` returns a tensor: bf16 for BF16, fp32 for every other type."""
        return torch.bfloat16 if self._tensors[name].tensor_type.name == "BF16" else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """Reads and dequantizes a tensor into CPU memory."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        # An F32 tensor is a view of the read-only mapped file, so copy it.
        dequantized = dequantize(tensor.data, tensor.tensor_type).copy()
        values = torch.from_numpy(dequantized).view(self.shape(name))
        projection = name.split(".")[-2]
        if self._interleaves and projection in self._heads:
            values = _halves_in_order(values, self._heads[projection])
        if self._is_gemma and name.endswith("norm.weight"):
            values = values - 1
        return values.to(self.dtype(name))

    def read_slice(self, name: str, dim: int, start: int, size: int) -> torch.Tensor:
        """Reads the whole tensor, like `read`, and returns a slice of it."""
        return self.read(name).narrow(dim, start, size)


def _halves_in_order(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders the rows of each head, from alternating halves to one half after the other; rows: [heads * d, ..]."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
