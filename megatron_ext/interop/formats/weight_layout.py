"""Maps the tensors of a Llama-like model between a checkpoint and Hugging Face: names, shapes and row order.

    checkpoint                                                   Hugging Face
    embedding.word_embeddings.weight          [V_pad, h]         model.embed_tokens.weight [V, h]
    decoder.layers.{i}.input_layernorm.weight                    model.layers.{i}.input_layernorm.weight
      self_attention.linear_qkv.{weight,bias} [(n + 2g) d, ..]   self_attn.{q,k,v}_proj.{weight,bias}
      self_attention.{q,k}_layernorm.weight   [d]                self_attn.{q,k}_norm.weight
      self_attention.linear_proj.{weight,bias}                   self_attn.o_proj.{weight,bias}
      pre_mlp_layernorm.weight                                   post_attention_layernorm.weight (1)
      mlp.linear_fc1.{weight,bias}            [2 f, ..]          mlp.{gate,up}_proj.{weight,bias}: gate, then up
      mlp.linear_fc2.{weight,bias}                               mlp.down_proj.{weight,bias}
    decoder.final_layernorm.weight                               model.norm.weight
    output_layer.weight                       [V_pad, h]         lm_head.weight [V, h], unless tied to the embedding

(1) This line is for models that normalize only inputs. Models with sandwich norms, such as Gemma, have the following
three norms instead; models that normalize only outputs, such as OLMo 2, have the first and the third:
      post_attention_layernorm.weight                            post_attention_layernorm.weight
      pre_mlp_layernorm.weight                                   pre_feedforward_layernorm.weight
      post_mlp_layernorm.weight                                  post_feedforward_layernorm.weight

With norms over all heads, as in OLMo 2, the weights of the norms of queries and keys are [n d] and [g d]. Phi-3 has
self_attn.qkv_proj, with the rows of q, then k, then v, and mlp.gate_up_proj, with gate, then up. With AltUp (k
residual streams) and Laurel, as in Gemma 3n:
    altup_start.weight                        [(k - 1) h, h]     model.altup_projections.{j}.weight
    decoder.final_layernorm.weight            [(k - 1) h, h]     model.altup_unembed_projections.{j}.weight
    decoder.final_layernorm.norm.weight       [h]                model.norm.weight
      altup.router, router_norm.weight                           altup.modality_router.weight, router_norm.weight
      altup.prediction, correction                               altup.{prediction,correction}_coefs.weight
      laurel.left, right                                         laurel.linear_left.weight, linear_right.weight
      laurel.post_norm.weight                                    laurel.post_laurel_norm.weight

With `layer_scalar` (Gemma 4):
      layer_scalar                            [1]                layer_scalar

The rows of linear_qkv are ordered by key/value group: the group's n/g query heads, then its key head, then its value
head; there is no value head if the keys are also the values, and there are only query heads if another layer supplies
the keys. Both formats rotate the two halves of a head, so the channels within a head keep their order. Names and
shapes are global: they do not depend on the parallel layout.
h: hidden size, f: FFN size, n: query heads, g: key/value heads, d: head size, V: vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_ext.config.groups.model.layer_shapes import LayerShape
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_config import FUSED

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Layout of one tensor of a checkpoint: the Hugging Face tensors from which it is built, and how."""

    name: str
    """Global name in a checkpoint."""

    shape: Shape
    """Unsharded shape in a checkpoint."""

    parts: tuple[tuple[str, Shape], ...]
    """Name and shape of each Hugging Face tensor."""

    kind: Literal["same", "rows", "groups", "fused groups", "vocabulary", "slice"]
    """Construction of the tensor. same: one part, unchanged; rows: the parts, concatenated; groups: the parts for q, k
    and v, their rows interleaved by key/value group; fused groups: the same, but from a single part that holds q, k and
    v one after the other; vocabulary: one part, padded with zero rows; slice: a slice of one part, padded with zero
    rows.
    """

    groups: int = 0
    """Number of key/value groups, for the kinds `groups` and `fused groups`."""

    place: tuple[int, int] = (0, 0)
    """Dimension and first index, for the kind `slice`."""


def entries(
    model: ModelConfig, vocab_size: int, padded_vocab_size: int, architecture: str | None = None
) -> list[Entry]:
    """Returns the entries for all tensors of a model, from the embedding to the output layer.

    Args:
        model: configuration of the base model, which `hf_config` must be able to express.
        vocab_size: number of rows of the embedding in Hugging Face's format.
        padded_vocab_size: number of rows of the embedding in a checkpoint.
        architecture: Hugging Face class. The classes in `FUSED` store q, k and v in one tensor, and gate and up in
            one.
    """
    hidden = model.hidden_size
    found = [
        _vocabulary("embedding.word_embeddings", "model.embed_tokens", model, vocab_size, padded_vocab_size)
    ]
    for layer in range(model.num_layers):
        found += _layer_entries(model, layer, is_fused=architecture in FUSED)
    norm = "decoder.final_layernorm.weight"
    if model.altup_streams is not None:
        found.append(_of_streams("altup_start.weight", "model.altup_projections", model))
        found.append(_of_streams(norm, "model.altup_unembed_projections", model))
        norm = "decoder.final_layernorm.norm.weight"
    found.append(_same(norm, "model.norm.weight", (hidden,)))
    if model.untie_embeddings_and_output_weights:
        found.append(_vocabulary("output_layer", "lm_head", model, vocab_size, padded_vocab_size))
    return found


def join(entry: Entry, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """Builds a checkpoint's tensor from Hugging Face's tensors.

    Args:
        entry: layout of the tensor, from `entries`.
        parts: Hugging Face's tensors, in the order and with the shapes given in `entry.parts`.
        model: configuration of the base model.

    Returns:
        Tensor of shape `entry.shape`.
    """
    if entry.kind == "same":
        return parts[0]
    if entry.kind == "rows":
        return torch.cat(list(parts))
    if entry.kind == "vocabulary":
        return with_padding(entry, parts[0])
    if entry.kind == "slice":
        dim, start = entry.place
        return with_padding(entry, parts[0].narrow(dim, start, entry.shape[dim]))
    groups = entry.groups
    if entry.kind == "fused groups":
        parts = parts[0].split(_rows_of_qkv(entry, model))
    # Rows of q, k and v are interleaved by group, so that every tensor-parallel shard of linear_qkv holds whole
    # groups.
    by_group = [part.reshape(groups, part.size(0) // groups, *part.shape[1:]) for part in parts]
    return torch.cat(by_group, dim=1).reshape(entry.shape)


def with_padding(entry: Entry, part: torch.Tensor) -> torch.Tensor:
    """Returns `part`, followed by zero rows up to the number of rows of `entry`."""
    padded = part.new_zeros(entry.shape)
    padded[: part.size(0)] = part
    return padded


def unused_tensors(model: ModelConfig) -> set[str]:
    """Returns the Hugging Face names of key and value projections in layers that use the keys and values of another
    layer.

    Google's Gemma 4 files contain these tensors, but transformers does not read them.
    """
    names = ("k_proj.weight", "v_proj.weight", "k_norm.weight", "k_proj.bias", "v_proj.bias")
    layers = [layer for layer, shape in enumerate(model.layers) if shape.keys_of is not None]
    return {f"model.layers.{layer}.self_attn.{name}" for layer in layers for name in names}


def split(entry: Entry, tensor: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """Splits a checkpoint's tensor into Hugging Face's tensors; the inverse of `join`.

    Args:
        entry: layout of the tensor, from `entries`.
        tensor: the checkpoint's tensor, of shape `entry.shape`.
        model: configuration of the base model.

    Returns:
        Hugging Face's tensors, in the order and with the shapes given in `entry.parts`.
    """
    shapes = [shape for _, shape in entry.parts]
    assert entry.kind != "slice", "the parts of several entries make up one tensor; see `per_layer_layout`"
    if entry.kind == "same":
        return [tensor]
    if entry.kind == "vocabulary":
        return [tensor[: shapes[0][0]]]
    if entry.kind == "rows":
        return list(tensor.split([shape[0] for shape in shapes]))
    groups, rows = entry.groups, [shape[0] for shape in shapes]
    if entry.kind == "fused groups":
        rows = _rows_of_qkv(entry, model)
    by_group = tensor.reshape(groups, tensor.size(0) // groups, *tensor.shape[1:])
    pieces = by_group.split([count // groups for count in rows], dim=1)
    found = [piece.reshape(count, *tensor.shape[1:]) for piece, count in zip(pieces, rows, strict=True)]
    return [torch.cat(found)] if entry.kind == "fused groups" else found


def _rows_of_qkv(entry: Entry, model: ModelConfig) -> list[int]:
    head = entry.shape[0] // (model.num_attention_heads + 2 * entry.groups)
    return [model.num_attention_heads * head, entry.groups * head, entry.groups * head]


_PLAIN = {"pre_mlp_layernorm": "post_attention_layernorm"}
_POST = {
    "post_attention_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_layernorm",
    "pre_mlp_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}


def _layer_entries(model: ModelConfig, layer: int, *, is_fused: bool) -> list[Entry]:
    ours, theirs, shape = f"decoder.layers.{layer}", f"model.layers.{layer}", model.layers[layer]
    hidden, ffn = model.hidden_size, shape.ffn_hidden_size
    queries, mlp = model.num_attention_heads * shape.kv_channels, f"{ours}.mlp"
    gate_up = [(f"{theirs}.mlp.gate_proj", ffn), (f"{theirs}.mlp.up_proj", ffn)]
    if is_fused:
        gate_up = [(f"{theirs}.mlp.gate_up_proj", 2 * ffn)]
    output, down = [(f"{theirs}.self_attn.o_proj", hidden)], [(f"{theirs}.mlp.down_proj", hidden)]
    found = []
    if not model.post_norm:
        found.append(_same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight", (hidden,)))
    found += _query_key_value_entries(
        model, shape, f"{ours}.self_attention", f"{theirs}.self_attn", is_fused=is_fused
    )
    projection = f"{ours}.self_attention.linear_proj"
    found += _linear(projection, output, queries, "same", model.has_attention_output_bias)
    norms = _SANDWICH if model.sandwich_norm else _POST if model.post_norm else _PLAIN
    for name, in_theirs in norms.items():
        found.append(_same(f"{ours}.{name}.weight", f"{theirs}.{in_theirs}.weight", (hidden,)))
    found += _linear(f"{mlp}.linear_fc1", gate_up, hidden, "rows", model.has_mlp_bias)
    found += _linear(f"{mlp}.linear_fc2", down, ffn, "same", model.has_mlp_bias)
    for name, in_theirs, size in _parts_of_gemma3n(model):
        found.append(_same(f"{ours}.{name}", f"{theirs}.{in_theirs}.weight", size))
    if model.layer_scalar:
        found.append(_same(f"{ours}.layer_scalar", f"{theirs}.layer_scalar", (1,)))
    return found


def _of_streams(name: str, theirs: str, model: ModelConfig) -> Entry:
    hidden, count = model.hidden_size, (model.altup_streams or 1) - 1
    parts = tuple((f"{theirs}.{number}.weight", (hidden, hidden)) for number in range(count))
    return Entry(name, (count * hidden, hidden), parts, "rows")


def _parts_of_gemma3n(model: ModelConfig) -> list[tuple[str, str, Shape]]:
    """Returns the checkpoint's name, Hugging Face's name without `.weight`, and the shape of each tensor of AltUp and
    Laurel in a layer.
    """
    hidden, streams, rank = model.hidden_size, model.altup_streams, model.laurel_rank
    found: list[tuple[str, str, Shape]] = []
    if streams is not None:
        found += [
            ("altup.router", "altup.modality_router", (streams, hidden)),
            ("altup.router_norm.weight", "altup.router_norm", (hidden,)),
            ("altup.prediction", "altup.prediction_coefs", (streams**2, streams)),
            ("altup.correction", "altup.correction_coefs", (streams, streams)),
        ]
    if rank is not None:
        found += [
            ("laurel.left", "laurel.linear_left", (rank, hidden)),
            ("laurel.right", "laurel.linear_right", (hidden, rank)),
            ("laurel.post_norm.weight", "laurel.post_laurel_norm", (hidden,)),
        ]
    return found


def _query_key_value_entries(
    model: ModelConfig, shape: LayerShape, ours: str, theirs: str, *, is_fused: bool
) -> list[Entry]:
    """Returns the entries of the projection to queries, keys and values, and of their norms."""
    head, groups = shape.kv_channels, shape.num_query_groups
    rows = {"q": model.num_attention_heads * head}
    if shape.keys_of is None:
        rows["k"] = groups * head
    if shape.keys_of is None and not shape.values_are_keys:
        rows["v"] = groups * head
    parts = [(f"{theirs}.{letter}_proj", size) for letter, size in rows.items()]
    kind: Literal["same", "groups", "fused groups"] = "same" if len(parts) == 1 else "groups"
    if is_fused:
        parts, kind = [(f"{theirs}.qkv_proj", sum(rows.values()))], "fused groups"
    found = _linear(f"{ours}.linear_qkv", parts, model.hidden_size, kind, model.has_qkv_bias, groups)
    if model.has_qk_norm:
        for letter in ("q", "k") if "k" in rows else ("q",):
            name, size = f"{theirs}.{letter}_norm.weight", rows[letter] if model.qk_projection_norm else head
            found.append(_same(f"{ours}.{letter}_layernorm.weight", name, (size,)))
    return found


def _linear(
    name: str,
    outputs: list[tuple[str, int]],
    width: int,
    kind: Literal["same", "rows", "groups", "fused groups"],
    has_bias: bool,
    groups: int = 0,
) -> list[Entry]:
    """Returns the entries for weight and bias of a checkpoint's linear layer, which may combine several of Hugging
    Face's; `outputs` has the name and the output size of each of those.
    """
    total = sum(rows for _, rows in outputs)
    weights = tuple((f"{part}.weight", (rows, width)) for part, rows in outputs)
    biases = tuple((f"{part}.bias", (rows,)) for part, rows in outputs)
    found = [Entry(f"{name}.weight", (total, width), weights, kind, groups)]
    return [*found, Entry(f"{name}.bias", (total,), biases, kind, groups)] if has_bias else found


def _same(name: str, theirs: str, shape: Shape) -> Entry:
    return Entry(name, shape, ((theirs, shape),), "same")


def _vocabulary(name: str, theirs: str, model: ModelConfig, rows: int, padded_rows: int) -> Entry:
    part = (f"{theirs}.weight", (rows, model.hidden_size))
    return Entry(f"{name}.weight", (padded_rows, model.hidden_size), (part,), "vocabulary")
