"""Exports models with PLE or NPT layers to Hugging Face directories, and imports these again; see `family_parts`."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.per_layer.per_layer_table import load_per_layer_table
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.interop import export_checkpoint
from megatron_ext.interop.added_parts import SECTIONS, AddedParts
from megatron_ext.interop.formats.hf_files import SafetensorsFiles
from megatron_ext.interop.hf_export import check_families
from megatron_ext.interop.hf_import import Families
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.npt.weights.np_weight_files import read_np_weight_file, read_np_weights
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.registry.remote_code.family_parts import IDS, families_in, parts_of, stored_factors

EXPORTED = (PerLayerFamily.name, NPTFamily.name)


def export_with_code(
    load: str,
    model_dir: str,
    *,
    per_layer_vocab_file: str | None = None,
    npt_weights: str | None = None,
    **options: Any,
) -> list[str]:
    """Exports the model in a checkpoint with the parts that PLE and NPT add to it.

    Args:
        load: a directory of checkpoints, or the directory of one checkpoint.
        model_dir: output directory.
        per_layer_vocab_file: file of a per-layer vocabulary. The table of per-layer ids is read from its directory,
            instead of from the checkpoint.
        npt_weights: file of NP weights, to add to a base model's checkpoint or to use instead of the checkpoint's
            own.
        options: see `interop.export_checkpoint`.

    Returns:
        Messages for the user.

    Raises:
        ValueError: as in `interop.export_checkpoint`; also if the checkpoint has other families, or no per-layer ids.
        OSError: as in `interop.export_checkpoint`.
    """
    read_parts = partial(_parts, load, per_layer_vocab_file, npt_weights)
    return export_checkpoint(load, model_dir, read_parts=read_parts, **options)


def _parts(
    load: str,
    vocab_file: str | None,
    npt_weights: str | None,
    run_config: dict[str, Any],
    model: ModelConfig,
    tokenizer_config: TokenizerConfig,
) -> AddedParts | None:
    families = dict(run_config["families"])
    check_families({name: families[name] for name in families if name not in EXPORTED}, load, base_only=False)
    eod = None
    if PerLayerFamily.name in families:
        stored = families[PerLayerFamily.name]
        if stored["settings"]["per_layer_preset"] == "gemma3n":
            raise ValueError(
                f"--load {load}: cannot be exported: --per-layer-preset gemma3n requires Gemma3nForCausalLM, which "
                "lacks some parts of this model"
            )
        families[PerLayerFamily.name] = _with_table(stored, load, vocab_file, tokenizer_config)
        if stored["settings"]["per_layer_strategy"] == "attention_guidance":
            eod = build_tokenizer(tokenizer_config).eod
    elif vocab_file is not None:
        raise ValueError(
            f"--per-layer-vocab-file {vocab_file}: the model of --load {load} has no per-layer embedding; omit the flag"
        )
    tensors: dict[str, torch.Tensor] = {}
    if npt_weights is not None:
        settings, tensors = _np_weights(npt_weights, families.get(NPTFamily.name), model)
        families[NPTFamily.name] = NPTFamily(settings).configuration()
    return replace(parts_of(families, model, eod), tensors=tensors) if families else None


def _with_table(
    stored: dict[str, Any], load: str, vocab_file: str | None, tokenizer_config: TokenizerConfig
) -> dict[str, Any]:
    """Returns PLE's configuration, to which a table of per-layer ids is added if the strategy needs one."""
    family = PerLayerFamily.from_configuration(stored)
    if not family.settings.needs_table or (family.table is not None and vocab_file is None):
        return stored
    if vocab_file is None:
        raise ValueError(
            f"--load {load}: was trained on aligned per-layer data and has no table of per-layer ids; "
            "give the data's vocabulary with --per-layer-vocab-file"
        )
    strategy, tokenizer = family.settings.per_layer_strategy, build_tokenizer(tokenizer_config)
    table = load_per_layer_table(strategy, tokenizer=tokenizer, vocab_file=vocab_file)
    return {**stored, "table": table.tolist()}


def _np_weights(
    path: str, stored: dict[str, Any] | None, model: ModelConfig
) -> tuple[NPTModuleConfig, dict[str, torch.Tensor]]:
    """Returns the settings and the factors of a file of NP weights; the factors have their names in a checkpoint."""
    if stored is not None:
        settings = NPTFamily.from_configuration(stored).settings
        tensors = read_np_weights(path, settings)
    else:
        tensors, found = read_np_weight_file(path)
        if found is None:
            raise ValueError(
                f"--npt-weights {path}: config.json, which specifies the layers and the form of the "
                "weights, is missing in this file's directory"
            )
        settings = found
    NPTFamily(settings).check(model, ParallelConfig())
    try:
        return settings, stored_factors(tensors, settings, model)
    except ValueError as error:
        raise ValueError(f"--npt-weights {path}: {error}") from None


def read_families(
    config: dict[str, Any], files: SafetensorsFiles, model: ModelConfig, tokenizer: Tokenizer
) -> Families:
    """Returns the model families of an exported directory; `interop.import_checkpoint` calls this function.

    Args:
        config: content of config.json.
        files: the directory's tensors.
        model: configuration of the base model.
        tokenizer: the model's tokenizer.

    Raises:
        ValueError: config.json has unknown, missing or contradictory fields in the families' sections.
    """
    try:
        found = families_in(config, files.read_integers(IDS))
    except (KeyError, TypeError, ValueError) as error:
        missing = isinstance(error, KeyError)
        reason = f"{error.args[0]} is missing" if missing else str(error)
        raise ValueError(f"{files.folder}/config.json: {' or '.join(SECTIONS)}: {reason}") from None
    groups = {}
    if (
        PerLayerFamily.name in found
    ):  # these flags continue the training of PLE; NPT instead starts from a base model
        groups["per_layer"] = PerLayerFamily.from_configuration(found[PerLayerFamily.name]).settings
    return Families(configurations=found, groups=groups, parts=parts_of(found, model, tokenizer.eod))
