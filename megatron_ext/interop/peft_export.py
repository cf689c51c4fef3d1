"""Exports a LoRA adapter in the format of Hugging Face's `peft`, for a base model exported by `interop.export_hf`.

The files adapter_config.json and adapter_model.safetensors are written into a directory, which
`PeftModel.from_pretrained(base, directory)` loads.

An adapter adds the product B A of two factors to a weight. Hugging Face splits megatron-core's fused projections, so
the adapter of a fused projection is split too: each part gets its rows of B and a copy of A. This leaves the rows of
B A unchanged, so the model computes the same function. Each adapter is exported separately; `peft` adds up the active
adapters:

    model = PeftModel.from_pretrained(base, "stack", adapter_name="stack")
    model.load_adapter("progressive", adapter_name="progressive")
    model.base_model.set_adapter(["stack", "progressive"])
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.configs.hf_config import choose_architecture
from megatron_ext.interop.formats.weight_layout import Entry, entries, split
from megatron_ext.interop.output_directory import check_free, complete_directory
from megatron_ext.lora.adapter import LoRAAdapter
from megatron_ext.lora.lora_config import AdapterShape
from megatron_ext.lora.trainable_layers import adapted_linears
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.platform.collectives import gather_or_raise, merge_over_ranks, on_first_rank
from megatron_ext.training.checkpoint.checkpoint_files import write_safetensors_file

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

ADAPTER_FLAG = "--adapter-dir"
"""Command-line flag for the output directory, used in error messages."""


def gather_lora_factors(chunks: list[GPTModel], name: str) -> dict[str, torch.Tensor]:
    """Gathers the unsharded factors A and B of an adapter in CPU memory on every rank. Collective.

    Args:
        chunks: this rank's model chunks, unwrapped.
        name: name of the adapter.

    Returns:
        Tensors named `decoder.layers.{i}.{linear}.A` [rank, inputs] and `...{linear}.B` [outputs, rank].
    """
    infix = f".{ADAPTERS}.{name}."
    pieces = []
    for chunk in chunks:
        for key, value in chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA)).items():
            if infix not in key:
                continue
            # A factory stands for a fused projection, whose parts are separate shards. If several ranks hold a shard,
            # its replica_id is zero on exactly one of them.
            shards = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            pieces += [_piece(shard) for shard in shards if not any(shard.replica_id)]
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, values in sorted(
        (piece for rank in gather_or_raise(lambda: pieces) for piece in rank), key=lambda piece: piece[:3]
    ):
        target = whole.setdefault(key.replace(infix, "."), torch.empty(shape, dtype=values.dtype))
        target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return whole


def _piece(shard: ShardedTensor) -> tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]:
    return shard.key, shard.global_shape, shard.global_offset, shard.data.detach().cpu().clone()


def export_peft(
    chunks: list[GPTModel],
    name: str,
    model: ModelConfig,
    directory: str | Path,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one adapter in `peft`'s format, for all layers that have it. Collective; rank 0 writes.

    After an error, nothing is left at `directory`.

    Args:
        chunks: this rank's model chunks, unwrapped.
        name: name of the adapter.
        model: configuration of the base model.
        directory: output directory; must be empty or not exist, unless `overwrite` is set.
        base_model: path or hub name of the exported base model, recorded in adapter_config.json.
        overwrite: replace the content of `directory`.

    Raises:
        ValueError: no layer has the adapter, `directory` is not empty, or no supported architecture can express the
            model.
        OSError: the directory cannot be written.
    """
    choose_architecture(model, None)
    _export(chunks, name, model, directory, base_model, overwrite=overwrite)


def _export(
    chunks: list[GPTModel],
    name: str,
    model: ModelConfig,
    directory: str | Path,
    base_model: str | None,
    *,
    overwrite: bool,
) -> None:
    shapes = _shapes(chunks, name)
    if not shapes:
        raise ValueError(f"adapter {name}: no layer of the model has an adapter of this name")
    factors = gather_lora_factors(chunks, name)

    def write() -> None:
        check_free(directory, ADAPTER_FLAG, overwrite=overwrite)
        with complete_directory(directory, ADAPTER_FLAG, overwrite=overwrite) as folder:
            config = peft_config(shapes, model.num_layers, base_model)
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_safetensors_file(folder / TENSORS_FILE, peft_tensors(factors, model), {"format": "pt"})

    on_first_rank(write)


def write_adapters(
    chunks: list[GPTModel], model: ModelConfig, directory: Path, base_model: str, *, overwrite: bool
) -> list[str]:
    """Writes each adapter of a model to a directory named after the adapter; returns a message per adapter.

    The caller must have checked that an architecture can express the model. For a Gemma, this check needs the per-layer
    embedding, which is not an argument here.
    """
    names = sorted({name for _, _, linear in adapted_linears(chunks) for name in linear.adapters})
    for name in names:
        _export(chunks, name, model, directory / name, base_model, overwrite=overwrite)
    return [f"wrote adapter {name} in peft's format to {directory / name}" for name in names]


def peft_tensors(factors: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Renames and splits the result of `gather_lora_factors` into the tensors that `peft` expects.

    Args:
        factors: A [rank, inputs] and B [outputs, rank] by the linear layer's name.
        model: configuration of the base model.
    """
    found: dict[str, torch.Tensor] = {}
    for entry in entries(model, 1, 1):
        linear = entry.name.removesuffix(".weight")
        if f"{linear}.A" not in factors:
            continue
        a, b = factors[f"{linear}.A"], factors[f"{linear}.B"]
        for (part, _), rows in zip(entry.parts, split(_for_rows(entry, b.size(1)), b, model), strict=True):
            prefix = f"base_model.model.{part.removesuffix('.weight')}"
            found[f"{prefix}.lora_A.weight"] = a.clone()
            found[f"{prefix}.lora_B.weight"] = rows.clone()
    return found


def _for_rows(entry: Entry, rank: int) -> Entry:
    """Returns the layout of factor B: it has the weight's rows and parts, but `rank` columns."""
    parts = tuple((name, (shape[0], rank)) for name, shape in entry.parts)
    return replace(entry, shape=(entry.shape[0], rank), parts=parts)


def peft_config(shapes: dict[int, AdapterShape], num_layers: int, base_model: str | None) -> dict[str, Any]:
    """Returns the content of peft's adapter_config.json.

    Args:
        shapes: rank and alpha by layer index, for the layers that have the adapter.
        num_layers: number of layers of the base model.
        base_model: path or hub name of the base model, or None.
    """
    # peft takes a default rank and alpha, and patterns for the layers with other values.
    usual = Counter(shapes.values()).most_common(1)[0][0]
    others = {rf"model\.layers\.{i}\..*": shape for i, shape in shapes.items() if shape != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": usual.rank,
        "lora_alpha": usual.alpha,
        "rank_pattern": {key: shape.rank for key, shape in others.items()},
        "alpha_pattern": {key: shape.alpha for key, shape in others.items()},
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": sorted(shapes) if len(shapes) < num_layers else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _shapes(chunks: list[GPTModel], name: str) -> dict[int, AdapterShape]:
    """Returns the adapter's rank and alpha by layer index, over all pipeline stages. Collective."""
    local = {
        number: adapter.shape
        for number, _, linear in adapted_linears(chunks)
        for found, adapter in linear.adapters.items()
        if found == name and isinstance(adapter, LoRAAdapter)
    }
    return merge_over_ranks(local)
