"""Maps the tensors of per-layer embedding between a checkpoint and Hugging Face's Gemma 4 and 3n.

    checkpoint                                                   Hugging Face
    per_layer.layers.{i}.embedding.weight     [V_p, p]           model.embed_tokens_per_layer.weight: columns i p ..
    per_layer.layers.{i}.context_projection.weight  [p, h]       model.per_layer_model_projection.weight: rows i p ..
    per_layer.norm.weight                     [p]                model.per_layer_projection_norm.weight
    decoder.layers.{i}.after_mlp.
      gate.weight                             [p, h]             model.layers.{i}.per_layer_input_gate.weight
      projection.weight                       [h, p]             model.layers.{i}.per_layer_projection.weight
      post_norm.weight                        [h]                model.layers.{i}.post_per_layer_input_norm.weight
      layer_scalar (Gemma 4)                  [1]                model.layers.{i}.layer_scalar
      input_scale (Gemma 3n)                  [h]                model.layers.{i}.altup.correct_output_scale

Hugging Face stores the tables of L layers in one tensor [V, L p], and the projections in one tensor [L p, h]. Layer i
has p columns or rows of it, from index i p on.
V_p: rows of a checkpoint's table, V: rows of Hugging Face's table, p: per-layer hidden size, h: hidden size.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_per_layer import PerLayer
from megatron_ext.interop.formats.weight_layout import Entry

FAMILY = "per_layer"
"""Name of the model family in a checkpoint."""

_FIXED: dict[str, Any] = {
    "use_per_layer_embedding": True,
    "per_layer_combination_method": "scaled_add",
    "per_layer_gate_activation": "gelu_tanh",
    "per_layer_position": "after_mlp",
    "per_layer_embed_scale": 1.0,
    "per_layer_strategy": "identity",
}
"""Settings of per-layer embedding that Gemma 4 and 3n have in common."""


def family_of(per_layer: PerLayer, vocab_size: int) -> dict[str, Any]:
    """Returns the family's configuration in the form in which a checkpoint stores it, for a tokenizer with `vocab_size`
    ids.
    """
    own = {
        "per_layer_preset": per_layer.preset,
        "per_layer_vocab_size": per_layer.rows,
        "per_layer_hidden_size": per_layer.width,
    }
    return {"settings": {**_FIXED, **own}, "vocab_size": vocab_size, "table": None}


def exported_per_layer(families: Mapping[str, Any]) -> PerLayer | None:
    """Returns a checkpoint's per-layer embedding if it has the form of a Gemma model, otherwise None.

    Args:
        families: the section `families` of the run's configuration.
    """
    family = families.get(FAMILY, {})
    settings = family.get("settings", {})
    preset = settings.get("per_layer_preset")
    if any(settings.get(name) != value for name, value in _FIXED.items()):
        return None
    if preset not in ("gemma4", "gemma3n"):
        return None
    rows = settings.get("per_layer_vocab_size") or family["vocab_size"]
    return PerLayer(
        preset=preset,
        width=settings["per_layer_hidden_size"],
        rows=rows if preset == "gemma3n" else None,
    )


def per_layer_entries(model: ModelConfig, per_layer: PerLayer, rows: int, rows_in_theirs: int) -> list[Entry]:
    """Returns the entries of all tensors that per-layer embedding adds to the model.

    Args:
        model: configuration of the base model.
        per_layer: the per-layer embedding; if `per_layer.rows` is set, tables have this number of rows in both
            formats.
        rows: number of rows of a table in a checkpoint.
        rows_in_theirs: number of rows of the table in Hugging Face's format.
    """
    layers, hidden, width = model.num_layers, model.hidden_size, per_layer.width
    rows, rows_in_theirs = per_layer.rows or rows, per_layer.rows or rows_in_theirs
    scale = ("layer_scalar", "layer_scalar", (1,))
    if per_layer.preset == "gemma3n":
        scale = ("input_scale", "altup.correct_output_scale", (hidden,))
    table = ("model.embed_tokens_per_layer.weight", (rows_in_theirs, layers * width))
    context = ("model.per_layer_model_projection.weight", (layers * width, hidden))
    norm = ("model.per_layer_projection_norm.weight", (width,))
    found = [Entry("per_layer.norm.weight", (width,), (norm,), "same")]
    for layer in range(layers):
        ours, theirs = f"per_layer.layers.{layer}", f"model.layers.{layer}"
        block = f"decoder.layers.{layer}.after_mlp"
        start = layer * width
        found += [
            Entry(f"{ours}.embedding.weight", (rows, width), (table,), "slice", place=(1, start)),
            Entry(
                f"{ours}.context_projection.weight", (width, hidden), (context,), "slice", place=(0, start)
            ),
        ]
        for name, in_theirs, shape in (
            ("gate.weight", "per_layer_input_gate.weight", (width, hidden)),
            ("projection.weight", "per_layer_projection.weight", (hidden, width)),
            ("post_norm.weight", "post_per_layer_input_norm.weight", (hidden,)),
            scale,
        ):
            found.append(Entry(f"{block}.{name}", shape, ((f"{theirs}.{in_theirs}", shape),), "same"))
    return found


def pack(found: Sequence[Entry], slices: Iterable[torch.Tensor]) -> torch.Tensor:
    """Builds a Hugging Face tensor from the slices that the entries describe; padding rows are dropped.

    Args:
        found: entries of the kind `slice` that together fill the same Hugging Face tensor.
        slices: the checkpoint's tensors.
    """
    _, shape = found[0].parts[0]
    packed = torch.empty(0)
    for entry, value in zip(found, slices, strict=True):
        if not packed.numel():
            packed = value.new_empty(shape)
        dim, start = entry.place
        target = packed.narrow(dim, start, value.size(dim))
        target.copy_(value[: target.size(0)])
    return packed
