"""Exports a checkpoint with adapters to Hugging Face: adapters merged into the weights, or as separate `peft` adapters.

The model is built and loaded in one process in fp32; then its model family merges the adapters or writes them.
`interop.export_checkpoint` exports base models tensor by tensor, without building them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.adapters.adapter_family import AdapterFamily
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.inference.load_model import LoadedModel, load_model
from megatron_ext.interop import base_state, export_hf
from megatron_ext.interop.formats.configs.hf_config import FUSED, choose_architecture, read_architecture
from megatron_ext.interop.formats.imported_model import Imported
from megatron_ext.interop.formats.per_layer_layout import FAMILY
from megatron_ext.interop.hf_export import DEFAULT_MAX_SHARD_SIZE, gemma_per_layer
from megatron_ext.interop.hf_import import require_one_process
from megatron_ext.interop.live_model_weights import whole_state
from megatron_ext.interop.output_directory import check_free
from megatron_ext.platform import process_groups
from megatron_ext.registry.known_families import FAMILIES
from megatron_ext.training.checkpoint.checkpointer import read_run_config


def export_plain(
    load: str,
    model_dir: str,
    *,
    adapter_dir: str | None = None,
    ckpt_step: int | None = None,
    architecture: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    tokenizer_model: str | None = None,
    no_tokenizer: bool = False,
) -> list[str]:
    """Exports a checkpoint's model with its adapters merged, or its base model and each adapter separately.

    Arguments that are not described here are those of `export_hf`.

    Args:
        load: a directory of checkpoints, or the directory of one checkpoint.
        adapter_dir: output directory with one subdirectory per adapter; None merges the adapters.
        ckpt_step: step to export; the default is the newest.
        dtype: float32, bfloat16 or float16; the default is the precision of the training run.
        tokenizer_model: path of the tokenizer's files; the default is the path that training used.
        no_tokenizer: export the model without a tokenizer.

    Returns:
        Messages for the user.

    Raises:
        ValueError: as in `export_hf`; also if the checkpoint has no adapters, or they cannot be merged or exported.
        OSError: as in `export_hf`.
    """
    require_one_process()
    check_free(model_dir, "--model-dir", overwrite=overwrite)
    if adapter_dir is not None:
        check_free(adapter_dir, "--adapter-dir", overwrite=overwrite)
    stored = read_run_config(load, ckpt_step)
    model = group_in(ModelConfig, stored, "model")
    imported = Imported.of_run(stored)
    if architecture is None and imported is not None:
        architecture, _ = read_architecture(imported.config, "imported config.json")
    per_layer = gemma_per_layer(model, _besides_adapters(stored["families"]), architecture)
    chosen = choose_architecture(model, architecture, per_layer)
    if chosen in FUSED and adapter_dir is not None:
        raise ValueError(
            f"--adapter-dir {adapter_dir}: requires an architecture whose query, key, value, gate and up weights are "
            f"separate projections (got {chosen}); use --architecture LlamaForCausalLM, or --merge-adapters"
        )
    exported = {FAMILY} if per_layer is not None else set()
    _check_families(stored["families"], load, exported, as_adapters=adapter_dir is not None)
    tokenizer = group_in(TokenizerConfig, stored, "tokenizer")
    if tokenizer_model is not None:
        tokenizer = replace(tokenizer, tokenizer_model=tokenizer_model)
    try:
        loaded = load_model(load, FAMILIES, ckpt_step=ckpt_step, tokenizer=tokenizer)
        adapted = [family for family in loaded.families if family.name not in exported]
        messages = _merge_or_write(loaded, adapted, adapter_dir, model_dir, overwrite=overwrite)
        written = export_hf(
            loaded.config,
            stored["vocab_size"],
            base_state([loaded.model]) if per_layer is None else whole_state([loaded.model]),
            model_dir,
            tokenizer_config=None if no_tokenizer else tokenizer,
            architecture=architecture,
            dtype=dtype or _precision(stored["training"]),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            imported=imported,
            per_layer=per_layer,
        )
    finally:
        process_groups.shutdown()
    return [*written, *messages]


def _besides_adapters(families: dict[str, Any]) -> dict[str, Any]:
    return {name: stored for name, stored in families.items() if name != AdapterFamily.name}


def _merge_or_write(
    loaded: LoadedModel,
    families: list[Any],
    adapter_dir: str | None,
    model_dir: str,
    *,
    overwrite: bool,
) -> list[str]:
    """Merges the adapters of `families` into the weights, or writes them to `adapter_dir`; returns messages."""
    chunks, messages = [loaded.model], list[str]()
    # `_check_families` has checked that every family has these methods.
    for family in families:
        if adapter_dir is None:
            messages += family.merge(chunks)
        else:
            messages += family.write_adapters(
                chunks, loaded.config, Path(adapter_dir), model_dir, overwrite=overwrite
            )
    return messages


def _check_families(families: dict[str, Any], load: str, exported: set[str], *, as_adapters: bool) -> None:
    """Raises `ValueError` unless every model family can be exported; called before the slow loading of the model.

    Args:
        families: the section `families` of the run's configuration.
        load: value of `--load`, for error messages.
        exported: names of the families that the Hugging Face architecture itself has (PLE in a Gemma model).
        as_adapters: whether the adapters are written separately instead of being merged.
    """
    if not families.keys() - exported:
        raise ValueError(
            f"--load {load}: is a base model without adapters; export it without --merge-adapters and --adapter-dir"
        )
    for name in (families.keys() & FAMILIES.keys()) - exported:
        try:
            FAMILIES[name].from_configuration(families[name]).check_plain(as_adapters=as_adapters)
        except ValueError as error:
            advice = (
                "; use convert_checkpoint.py merge, and export its result"
                if AdapterFamily.name in families
                else ""
            )
            raise ValueError(f"--load {load}: {error}{advice}") from None


def _precision(training: dict[str, Any]) -> str:
    """Returns the precision of the training run, whose configuration may lack the newer field `fp16`."""
    return "bfloat16" if training["bf16"] else "float16" if training.get("fp16") else "float32"
