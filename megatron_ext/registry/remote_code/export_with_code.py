"""Exports a model with PLE or NPT layers, and imports such a directory again; see `family_parts`."""

from functools import partial
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.data.per_layer.per_layer_table import load_per_layer_table
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.interop import export_checkpoint
from megatron_ext.interop.added_parts import SECTIONS, AddedParts
from megatron_ext.interop.formats.hf_files import SafetensorsFiles
from megatron_ext.interop.hf_export import check_families
from megatron_ext.interop.hf_import import Families
from megatron_ext.npt.npt_family import NPTFamily
from megatron_ext.per_layer.per_layer_family import PerLayerFamily
from megatron_ext.registry.remote_code.family_parts import IDS, families_in, parts_of

EXPORTED = (PerLayerFamily.name, NPTFamily.name)


def export_with_code(
    load: str, model_dir: str, *, per_layer_vocab_file: str | None = None, **options: Any
) -> list[str]:
    """Exports the model in a checkpoint with what PLE and NPT add to it.

    Args:
        load: a directory of checkpoints, or the directory of one checkpoint.
        model_dir: output directory.
        per_layer_vocab_file: vocabulary next to which the table of per-layer ids lies, for a checkpoint without one.
        options: see `interop.export_checkpoint`.

    Returns:
        Messages for the user.

    Raises:
        ValueError: as in `interop.export_checkpoint`; also if the checkpoint has other families, or no per-layer ids.
        OSError: as in `interop.export_checkpoint`.
    """
    read_parts = partial(_parts, load, per_layer_vocab_file)
    return export_checkpoint(load, model_dir, read_parts=read_parts, **options)


def _parts(
    load: str,
    vocab_file: str | None,
    run_config: dict[str, Any],
    model: ModelConfig,
    tokenizer_config: TokenizerConfig,
) -> AddedParts:
    families = dict(run_config["families"])
    check_families({name: families[name] for name in families if name not in EXPORTED}, load, base_only=False)
    tokenizer = build_tokenizer(tokenizer_config)
    if PerLayerFamily.name not in families and vocab_file is not None:
        raise ValueError(f"--per-layer-vocab-file {vocab_file}: {load} has no per-layer embedding")
    if PerLayerFamily.name in families:
        stored = families[PerLayerFamily.name]
        family = PerLayerFamily.from_configuration(stored)
        if not family.settings.uses_token_ids and (family.table is None or vocab_file is not None):
            if vocab_file is None:
                raise ValueError(
                    f"--load {load}: was trained on aligned per-layer data and has no table of per-layer ids; give the "
                    "vocabulary that the data was made with as --per-layer-vocab-file"
                )
            table = load_per_layer_table(
                family.settings.per_layer_strategy, tokenizer=tokenizer, vocab_file=vocab_file
            )
            families[PerLayerFamily.name] = {**stored, "table": torch.as_tensor(table).tolist()}
    return parts_of(families, model, tokenizer.eod)


def read_families(
    config: dict[str, Any], files: SafetensorsFiles, model: ModelConfig, tokenizer: Tokenizer
) -> Families:
    """Returns the families of an exported model; an argument of `interop.import_checkpoint`.

    Args:
        config: content of config.json.
        files: the directory's tensors.
        model: configuration of the base model.
        tokenizer: the model's tokenizer.

    Raises:
        ValueError: config.json has unknown, missing or contradicting fields in the families' sections.
    """
    try:
        found = families_in(config, files.read_integers(IDS))
    except (KeyError, TypeError, ValueError) as error:
        missing = isinstance(error, KeyError)
        reason = f"{error.args[0]} is missing" if missing else str(error)
        raise ValueError(f"{files.folder}/config.json: {' or '.join(SECTIONS)}: {reason}") from None
    groups = {}
    if PerLayerFamily.name in found:  # the flags with which training goes on; NPT starts from a base model
        groups["per_layer"] = PerLayerFamily.from_configuration(found[PerLayerFamily.name]).settings
    return Families(configurations=found, groups=groups, parts=parts_of(found, model, tokenizer.eod))
