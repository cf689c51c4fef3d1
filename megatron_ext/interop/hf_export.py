"""Exports a base model as a Hugging Face directory of a Llama-like architecture, which `from_pretrained` loads."""

import json
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.interop.added_parts import AddedParts
from megatron_ext.interop.checkpoint_without_model import CheckpointState
from megatron_ext.interop.formats.configs.hf_config import (
    PER_LAYER,
    choose_architecture,
    expresses,
    from_model_config,
    read_architecture,
)
from megatron_ext.interop.formats.configs.hf_per_layer import PerLayer
from megatron_ext.interop.formats.hf_files import Group, write_safetensors
from megatron_ext.interop.formats.imported_model import Imported
from megatron_ext.interop.formats.per_layer_layout import (
    FAMILY,
    exported_per_layer,
    pack,
    per_layer_entries,
)
from megatron_ext.interop.formats.tokenizer.tokenizer_files import TOKENIZER_CONFIG, write_files
from megatron_ext.interop.formats.tokenizer.tokenizer_readback import check_read_back
from megatron_ext.interop.formats.weight_layout import Entry, entries, split
from megatron_ext.interop.hf_import import require_one_process
from megatron_ext.interop.output_directory import check_free, complete_directory
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
from megatron_ext.training.checkpoint.checkpointer import read_run_config

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9

ReadParts = Callable[[dict[str, Any], ModelConfig, TokenizerConfig], AddedParts | None]
"""A function that returns the parts that families add to a run's base model, given run_config.json, the model's
configuration and the tokenizer's; None if there are no families.
"""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_hf(
    model: ModelConfig,
    vocab_size: int,
    state: Mapping[str, torch.Tensor],
    model_dir: str | Path,
    *,
    tokenizer_config: TokenizerConfig | None = None,
    architecture: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    imported: Imported | None = None,
    added: AddedParts | None = None,
    per_layer: PerLayer | None = None,
) -> list[str]:
    """Writes a Hugging Face directory; after an error, no files are left at `model_dir`.

    Args:
        model: configuration of the base model.
        vocab_size: number of embedding rows to write; any further rows in `state` are padding.
        state: unsharded tensors of the base model by global name, from a checkpoint, `base_state` or `load_hf`.
        model_dir: output directory.
        tokenizer_config: tokenizer to write into the same directory; None writes no tokenizer.
        architecture: Hugging Face class, such as `LlamaForCausalLM`. The default is the imported model's class, or
            else the first class that can express the model.
        dtype: float32, bfloat16 or float16; the default keeps the dtype of the tensors.
        max_shard_size: largest size of one safetensors file, in bytes.
        overwrite: replace the content of `model_dir`.
        imported: for an imported model, the configuration and small files of its source (`load_hf(...).imported`).
        added: the parts that model families add to the base model; `state` must include their tensors.
        per_layer: Gemma's per-layer embedding, or None; `state` must include its tensors.

    Returns:
        Messages for the user.

    Raises:
        ValueError: no supported architecture can express the model, the tensors do not match it, or `model_dir` is not
            empty.
        OSError: the directory cannot be written.
    """
    check_free(model_dir, "--model-dir", overwrite=overwrite)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if architecture is None and imported is not None:
        architecture, _ = read_architecture(imported.config, "imported config.json")
    chosen = choose_architecture(model, architecture, per_layer)
    if chosen in PER_LAYER.values() and added is not None:
        raise ValueError(
            f"a model exported as {chosen} cannot have added parts, other than per-layer embedding trained with the "
            "architecture's own --per-layer-preset; use --base-only to export the base without them"
        )
    tokenizer = build_tokenizer(tokenizer_config) if tokenizer_config is not None else None
    found = _entries_of(model, vocab_size, state, chosen, added, per_layer)
    first = _dtype(state, found[0].name)
    written_as = dtype or next(name for name, kind in DTYPES.items() if kind == first)
    config = from_model_config(
        model, vocab_size, chosen, written_as, imported.config if imported is not None else None, per_layer
    )
    tensors: Iterable[Group] = _tensors(found, model, state, DTYPES[dtype] if dtype else None)
    if added is not None:
        config, tensors = added.config(config), chain(tensors, map(_whole, added.buffers.items()))
    with complete_directory(model_dir, "--model-dir", overwrite=overwrite) as folder:
        messages = _write_tokenizer(folder, tokenizer_config, tokenizer, config)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if imported is not None:
            messages += imported.write_files(folder, _directory_of(tokenizer_config))
        if (folder / TOKENIZER_CONFIG).is_file() and tokenizer is not None:
            as_imported = _is_unchanged(imported, config)
            messages += check_read_back(
                folder, tokenizer, model_dir, as_imported=as_imported, has_code=added is not None
            )
        if added is not None:
            added.write_code(folder)
            messages.append(
                "the directory contains the model's code; load it with trust_remote_code=True (see docs/interop.md)"
            )
        write_safetensors(folder, tensors, max_shard_size)
    return [f"{config['architectures'][0]}, {written_as}", *messages]


def _whole(buffer: tuple[str, torch.Tensor]) -> Group:
    """Returns a group for `write_safetensors` with one tensor, which is written unchanged."""
    name, tensor = buffer
    return [(name, tensor.nbytes)], lambda: [tensor]


def _write_tokenizer(
    folder: Path, config: TokenizerConfig | None, tokenizer: Tokenizer | None, model_config: dict[str, Any]
) -> list[str]:
    """Writes the tokenizer's files, and adds its end token to the model's configuration; returns messages for the
    user.
    """
    if config is None or tokenizer is None:
        return []
    if not write_files(config, tokenizer, folder):
        return [
            f"no tokenizer is written, because transformers has no counterpart of {config.tokenizer_type}"
        ]
    # Without an end token, transformers would always generate up to the maximum length.
    if "eos_token_id" in model_config and model_config["eos_token_id"] is None:
        model_config["eos_token_id"] = tokenizer.eod
    return []


def _is_unchanged(imported: Imported | None, config: dict[str, Any]) -> bool:
    """Returns whether an imported model is exported without any training in between."""
    # After training, the exported tokenizer must give the ids that the model was trained on. Before any training, the
    # exported tokenizer may differ from ours in the same way as the tokenizer in the imported directory.
    return (
        imported is not None
        and not imported.is_trained
        and bool(config["model_type"] == imported.config["model_type"])
    )


def _entries_of(
    model: ModelConfig,
    vocab_size: int,
    state: Mapping[str, torch.Tensor],
    architecture: str,
    added: AddedParts | None,
    per_layer: PerLayer | None,
) -> list[Entry]:
    """Returns the layout entries of all tensors in `model`; raises `ValueError` unless `state` has exactly these."""
    found = entries(model, vocab_size, vocab_size, architecture) + ([] if added is None else added.entries)
    if per_layer is not None:
        found += per_layer_entries(model, per_layer, vocab_size, vocab_size)
    wanted = {entry.name for entry in found}
    for names, what in (
        (wanted - set(state), "the model to export lacks"),
        (set(state) - wanted, "the model to export has a tensor that no Llama-like model has:"),
    ):
        if names:
            raise ValueError(f"{what} {min(names)} (number of such tensors: {len(names)})")
    return found


def _tensors(
    found: list[Entry], model: ModelConfig, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> Iterator[Group]:
    """Yields groups for `write_safetensors`: (name, bytes) of each tensor, and a function that reads them."""
    slices: dict[str, list[Entry]] = {}
    for entry in found:
        size = (dtype or _dtype(state, entry.name)).itemsize
        sizes = [(name, torch.Size(shape).numel() * size) for name, shape in entry.parts]

        def read(entry: Entry = entry) -> list[torch.Tensor]:
            parts = split(entry, _read(state, entry), model)
            return [_converted(name, part, dtype) for (name, _), part in zip(entry.parts, parts, strict=True)]

        if entry.kind == "slice":
            slices.setdefault(entry.parts[0][0], []).append(entry)
            continue
        yield sizes, read
    for name, of_one in slices.items():
        kind = dtype or _dtype(state, of_one[0].name)

        def read_all(of_one: list[Entry] = of_one, kind: torch.dtype = kind) -> list[torch.Tensor]:
            return [pack(of_one, (_converted(entry.name, _read(state, entry), kind) for entry in of_one))]

        yield [(name, torch.Size(of_one[0].parts[0][1]).numel() * kind.itemsize)], read_all


def _read(state: Mapping[str, torch.Tensor], entry: Entry) -> torch.Tensor:
    whole = state[entry.name].detach().cpu()
    if entry.kind == "vocabulary":
        whole = whole[: entry.shape[0]]
    if whole.shape != entry.shape:
        raise ValueError(
            f"{entry.name}: the configuration requires shape {list(entry.shape)}, got {list(whole.shape)}"
        )
    return whole


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Returns a tensor in a dtype; None keeps its own.

    Raises:
        ValueError: a value is beyond fp16's range, as some weights of Gemma's norms are.
    """
    converted = tensor if dtype is None else tensor.to(dtype)
    if dtype is torch.float16 and tensor.dtype is not dtype:
        lost = converted.isinf() & tensor.isfinite()
        if lost.any():
            raise ValueError(
                f"--dtype float16: {name} has the value {float(tensor[lost][0]):g}, which is beyond fp16's range "
                "(65504); use bfloat16 or float32"
            )
    return converted


def _dtype(state: Mapping[str, torch.Tensor], name: str) -> torch.dtype:
    if isinstance(state, ChainMap):
        state = next(part for part in state.maps if name in part)
    return state.dtype(name) if isinstance(state, CheckpointState) else state[name].dtype


def _directory_of(tokenizer: TokenizerConfig | None) -> Path | None:
    if tokenizer is None or tokenizer.tokenizer_model is None:
        return None
    path = Path(tokenizer.tokenizer_model)
    return path if path.is_dir() else path.parent


def export_checkpoint(
    load: str,
    model_dir: str | Path,
    *,
    ckpt_step: int | None = None,
    architecture: str | None = None,
    dtype: str | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    base_only: bool = False,
    tokenizer_model: str | None = None,
    no_tokenizer: bool = False,
    read_parts: ReadParts | None = None,
) -> list[str]:
    """Exports the model in a checkpoint as a Hugging Face directory.

    For the other arguments, see `export_hf`.

    Args:
        load: a directory of checkpoints, or the directory of one checkpoint.
        ckpt_step: step to export; the default is the newest.
        base_only: export the frozen base model without the parameters that model families added to it.
        tokenizer_model: path of the tokenizer's files; the default is the path that training used.
        no_tokenizer: export the model without a tokenizer.
        read_parts: returns the parts that the model's families add to its base model; if None, a model with such
            families is refused.

    Returns:
        Messages for the user.

    Raises:
        ValueError: as in `export_hf`; also if the checkpoint is damaged, or was built with model families that can
            neither be exported nor left out (`base_only`).
        OSError: as in `export_hf`.
    """
    require_one_process()
    check_free(model_dir, "--model-dir", overwrite=overwrite)
    run_config = read_run_config(load, ckpt_step)
    model, tokens = (
        group_in(ModelConfig, run_config, "model"),
        group_in(TokenizerConfig, run_config, "tokenizer"),
    )
    per_layer = None if base_only else gemma_per_layer(model, run_config["families"], architecture)
    if base_only or (read_parts is None and per_layer is None):
        check_families(run_config["families"], load, base_only=base_only)
    choose_architecture(model, architecture, per_layer)
    tokenizer = None if no_tokenizer else _tokenizer_config(tokens, tokenizer_model, run_config, load)
    folder = find_checkpoint(load, ckpt_step)
    assert folder is not None, "the checkpoint exists, because its configuration has been read"
    added = None
    if read_parts is not None and not base_only and per_layer is None:
        added = read_parts(run_config, model, tokenizer or tokens)
    # mcore's checkpoint reader needs a process group, even for one process; the seed has no effect.
    process_groups.initialize(ParallelConfig(), seed=1234)
    try:
        # A run on a frozen base saves only the tensors that it trained; the base stays in its own checkpoint.
        base = BaseCheckpoint.of_run(run_config)
        folders = (folder,) if base is None else (folder, base.folder)
        stored: Any = CheckpointState(*folders, only=_base_names(model) if base_only else None)
        state = stored if added is None else ChainMap(dict(added.tensors), stored)
        return export_hf(
            model,
            run_config["vocab_size"],
            state,
            model_dir,
            tokenizer_config=tokenizer,
            architecture=architecture,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            per_layer=per_layer,
            imported=Imported.of_run(
                *([base.run_config()] if base is not None and base_only else []), run_config
            ),
            added=added,
        )
    finally:
        process_groups.shutdown()


def gemma_per_layer(
    model: ModelConfig, families: dict[str, Any], architecture: str | None
) -> PerLayer | None:
    """Returns the per-layer embedding if the model is exported as a Gemma with per-layer embedding, otherwise None.

    Args:
        model: configuration of the base model.
        families: the section `families` of the run's configuration, without adapters.
        architecture: the class to export to; None for any class.
    """
    found = exported_per_layer(families) if families.keys() == {FAMILY} else None
    if found is None or architecture not in (PER_LAYER[found.preset], None):
        return None
    return found if expresses(model, PER_LAYER[found.preset], found) else None


def _base_names(model: ModelConfig) -> set[str]:
    return {entry.name for entry in entries(model, 1, 1)}


def check_families(
    families: dict[str, Any], load: str, *, base_only: bool, target: str = "Llama-like"
) -> None:
    """Raises `ValueError` if a model with these families cannot be exported.

    Args:
        families: the section `families` of the run's configuration.
        load: value of `--load`, for error messages.
        base_only: whether only the base model is exported.
        target: kind of the exported model, such as Llama-like, for error messages.
    """
    for name, configuration in families.items():
        if not base_only:
            raise ValueError(
                f"--load {load}: no {target} model can express the model family {name}; use --base-only to "
                "export the frozen base without it"
                + (
                    ""
                    if target == "Megatron-LM"
                    else ", or --merge-adapters for a progressive model with adapters"
                )
            )
        if not _value(configuration, "freeze_base"):
            raise ValueError(
                f"--base-only requires a base that was frozen; the base of {load} was trained together with "
                f"the model family {name} and does not work without it"
            )


def _value(configuration: Any, name: str) -> Any:
    """Returns the first value stored under a key, at any depth of nested dicts, that is true in a boolean context."""
    if not isinstance(configuration, dict):
        return None
    return configuration.get(name) or any(_value(inner, name) for inner in configuration.values())


def _tokenizer_config(
    config: TokenizerConfig, tokenizer_model: str | None, run_config: dict[str, Any], load: str
) -> TokenizerConfig:
    if tokenizer_model is not None:
        config = replace(config, tokenizer_model=tokenizer_model)
    if build_tokenizer(config).fingerprint() != run_config["tokenizer_fingerprint"]:
        raise ValueError(
            f"--load {load}: this model was trained with a tokenizer other than {config.tokenizer_model}; "
            "give the original tokenizer with --tokenizer-model"
        )
    return config
