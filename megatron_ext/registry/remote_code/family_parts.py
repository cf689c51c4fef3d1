"""Converts PLE's and NPT's parts of a model between a checkpoint and an exported Hugging Face directory.

    checkpoint                                                     Hugging Face
    per_layer.norm.weight                              [p]         model.per_layer_norm.weight
    per_layer.layers.{i}.embedding.weight              [Vp, p]     model.layers.{i}.per_layer.embedding.weight
      .context_projection.weight                       [p, h]        .context_projection.weight
      .combination.weight                              [p, 2p]       .combination.weight
    decoder.layers.{i}.{slot}.gate.weight              [p, h]        .gate.weight
      .projection.weight, .post_norm.weight, .layer_scalar           the same names
    decoder.layers.{i}.feed_forward.{target}.{factor}              model.layers.{i}.np.{target}.{factor}
    run_config.json: the table of per-layer ids        [V]         model.per_layer_ids

`slot` is the value of --per-layer-position. Vp is the number of rows of the table, p their width, h the hidden size, V
the vocabulary size. In config.json each model family has a section, whose fields are named like the family's flags;
`modeling_megatron_ext` reads these sections.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.serialize import group_to_dict
from megatron_ext.data.per_layer.ngrams import hash_functions
from megatron_ext.data.per_layer.per_layer_ids import ATTENTION_PERIOD
from megatron_ext.data.per_layer.per_layer_vocab import SPECIAL
from megatron_ext.interop.added_parts import AddedParts
from megatron_ext.interop.formats.weight_layout import Entry, Shape
from megatron_ext.npt.modules.np_ranks import format_ranks
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.np_factors import join_components
from megatron_ext.per_layer.per_layer_config import PerLayerConfig
from megatron_ext.per_layer.per_layer_family import PerLayerFamily

CODE = Path(__file__).with_name("modeling_megatron_ext.py")
IDS = "model.per_layer_ids"
BASES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Phi3", "Olmo2", "Olmo3", "SmolLM3", "Granite")
"""Base models for which `modeling_megatron_ext` has a class."""

PER_LAYER_FIELDS = (
    "per_layer_preset",
    "per_layer_hidden_size",
    "per_layer_combination_method",
    "per_layer_gate_activation",
    "per_layer_position",
    "per_layer_projection_dropout",
    "per_layer_embed_scale",
    "per_layer_strategy",
)
"""PLE's fields that are written to config.json unchanged."""

NPT_FIELDS = (
    "np_form",
    "np_target",
    "num_np_components",
    "np_affine",
    "np_normalize",
    "np_residual",
    "np_scale",
    "freeze_base",
)
"""NPT's fields that are written to config.json unchanged."""


def parts_of(families: dict[str, Any], model: ModelConfig, eod: int | None) -> AddedParts:
    """Returns the parts that a checkpoint's families add to its base model.

    Args:
        families: PLE, NPT or both by name, as in the section `families` of run_config.json.
        model: configuration of the base model.
        eod: the tokenizer's end-of-document id, which only the strategy `attention_guidance` uses.
    """
    entries, fields, buffers = list[Entry](), dict[str, Any](), dict[str, torch.Tensor]()
    if PerLayerFamily.name in families:
        per_layer = PerLayerFamily.from_configuration(families[PerLayerFamily.name])
        entries += _per_layer_entries(per_layer.settings, model, per_layer.rows)
        fields["per_layer_embedding"] = _per_layer_section(per_layer, eod)
        if per_layer.table is not None:
            buffers[IDS] = per_layer.table.to(torch.int32)
    if NPTFamily.name in families:
        settings = NPTFamily.from_configuration(families[NPTFamily.name]).settings
        entries += _npt_entries(settings, model)
        fields["npt"] = _npt_section(settings, model)
    return AddedParts(entries=entries, fields=fields, buffers=buffers, code=CODE, bases=BASES)


def families_in(config: dict[str, Any], ids: torch.Tensor | None) -> dict[str, Any]:
    """Returns the section `families` of run_config.json for an exported directory; the inverse of `parts_of`.

    Args:
        config: content of config.json.
        ids: the directory's table of per-layer ids [V], or None.

    Raises:
        ValueError: a section has unknown or missing fields, or contradictory values.
    """
    found: dict[str, Any] = {}
    section = config.get("per_layer_embedding")
    if section is not None:
        fields = {name: section[name] for name in PER_LAYER_FIELDS}
        is_identity = section["per_layer_strategy"] == "identity"
        rows = None if is_identity else section["per_layer_vocab_size"]
        ngrams = section.get("ngrams")
        if ngrams is not None:
            fields["per_layer_hashes"] = ngrams["per_layer_hashes"]
        per_layer = PerLayerConfig(use_per_layer_embedding=True, per_layer_vocab_size=rows, **fields)
        family = PerLayerFamily(
            per_layer, config["vocab_size"], ids, eod=None if ngrams is None else ngrams["end_token"]
        )
        if ngrams != _per_layer_section(family, None).get("ngrams"):
            raise ValueError("ngrams: has other hash functions than this version of megatron_ext")
        found[family.name] = family.configuration()
    section = config.get("npt")
    if section is not None:
        fields = {name: section[name] for name in NPT_FIELDS}
        layers = ",".join(map(str, section["npt_layers"]))
        ranks = format_ranks((fc1, down) for fc1, down in section["np_rank"])
        npt = NPTFamily(NPTModuleConfig(npt_layers=layers, np_rank=ranks, **fields))
        found[npt.name] = npt.configuration()
    return found


def stored_factors(
    tensors: Mapping[str, torch.Tensor], settings: NPTModuleConfig, model: ModelConfig
) -> dict[str, torch.Tensor]:
    """Returns the factors in a file of NP weights, by their names in a checkpoint.

    Raises:
        ValueError: the file lacks a factor.
    """
    count, found = settings.num_np_components, {}
    for entry in _npt_entries(settings, model):
        _, _, layer, _, target, name = entry.name.split(".")
        try:
            found[entry.name] = join_components(f"layer_{layer}_np.{target}.{name}", count, tensors)
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing in the NP weights") from None
    return found


def _per_layer_section(family: PerLayerFamily, eod: int | None) -> dict[str, Any]:
    section = {name: group_to_dict(family.settings)[name] for name in PER_LAYER_FIELDS}
    section["per_layer_vocab_size"] = family.rows
    if family.settings.per_layer_strategy == "attention_guidance":
        marks = {"start": "<|layer_start|>", "repeated": "<|attention|>", "end": "<|layer_end|>"}
        ids = {name: SPECIAL[token] for name, token in marks.items()}
        section["marks"] = {"period": ATTENTION_PERIOD, **ids, "end_token": eod}
    if family.settings.hashes_ngrams:
        functions = hash_functions(family.settings.per_layer_strategy, family.settings.per_layer_hashes)
        section["ngrams"] = {
            "per_layer_hashes": family.settings.per_layer_hashes,
            "functions": [{"factors": list(each.factors), "offset": each.offset} for each in functions],
            "end_token": family.eod,
        }
    return section


def _per_layer_entries(settings: PerLayerConfig, model: ModelConfig, rows: int) -> list[Entry]:
    width, hidden = settings.per_layer_hidden_size, model.hidden_size
    of_stage = {
        "embedding.weight": (rows, width),
        "context_projection.weight": (width, hidden),
        "combination.weight": (width, 2 * width),
    }
    if settings.per_layer_combination_method == "scaled_add":
        del of_stage["combination.weight"]
    of_layer: dict[str, Shape] = {
        "gate.weight": (width, hidden),
        "projection.weight": (hidden, width),
        "post_norm.weight": (hidden,),
        **({"layer_scalar": (1,)} if settings.has_layer_scalar else {}),
    }
    found = [_entry("per_layer.norm.weight", "model.per_layer_norm.weight", (width,))]
    for layer in range(model.num_layers):
        theirs = f"model.layers.{layer}.per_layer"
        places = (
            (f"per_layer.layers.{layer}", of_stage),
            (f"decoder.layers.{layer}.{settings.per_layer_position}", of_layer),
        )
        for ours, shapes in places:
            found += [_entry(f"{ours}.{name}", f"{theirs}.{name}", shape) for name, shape in shapes.items()]
    return found


def _npt_section(settings: NPTModuleConfig, model: ModelConfig) -> dict[str, Any]:
    layers, count = settings.layers(model.num_layers), model.num_layers
    ranks = [[settings.rank(layer, target, count) for target in ("fc1", "down")] for layer in layers]
    fields = {name: group_to_dict(settings)[name] for name in NPT_FIELDS}
    return {**fields, "npt_layers": list(layers), "np_rank": ranks, "np_targets": list(settings.targets)}


def _npt_entries(settings: NPTModuleConfig, model: ModelConfig) -> list[Entry]:
    found = []
    for layer in settings.layers(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.feed_forward", f"model.layers.{layer}.np"
        for target in settings.targets:
            rank = settings.rank(layer, target, model.num_layers)
            for name, shape in _factor_shapes(settings, model, target, rank).items():
                found.append(_entry(f"{ours}.{target}.{name}", f"{theirs}.{target}.{name}", shape))
    return found


def _factor_shapes(settings: NPTModuleConfig, model: ModelConfig, target: str, rank: int) -> dict[str, Shape]:
    """Returns the shape of each factor of one target; the formulas are in `npt.modules`."""
    hidden, total = model.hidden_size, settings.num_np_components * rank
    reads_ffn = target == "down"
    widths = (hidden, model.resolved_ffn_hidden_size)
    output, read = widths if reads_ffn else widths[::-1]
    if settings.np_form == "key_value":
        return {"A": (hidden, total), "B": (total, hidden)}
    if settings.np_form == "low_rank":
        return {
            "A": (hidden, total),
            **({"A_in": (read, total)} if reads_ffn else {}),
            "B": (total, output),
        }
    affine = {"c_a": (settings.num_np_components, read)} if settings.has_affine else {}
    return {"W_down": (hidden, total), "W_a_up": (total, read), **affine, "W_b_up": (total, output)}


def _entry(name: str, theirs: str, shape: Shape) -> Entry:
    return Entry(name, shape, ((theirs, shape),), "same")
