"""Imports a Llama-like model from a local Hugging Face directory or GGUF file, into memory or into a checkpoint.

Nothing is downloaded, and no code from the directory is run.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import format_groups, group_to_dict, sections_of
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.interop.added_parts import AddedParts, base_config, is_extended
from megatron_ext.interop.checkpoint_without_model import write_checkpoint
from megatron_ext.interop.formats.configs.hf_config import HFModel, to_model_config
from megatron_ext.interop.formats.hf_files import HuggingFaceState, SafetensorsFiles, TensorFiles, read_config
from megatron_ext.interop.formats.imported_model import Imported, left_behind
from megatron_ext.interop.formats.per_layer_layout import FAMILY, family_of, per_layer_entries
from megatron_ext.interop.formats.text_part import TextTensors, has_text_part, text_config
from megatron_ext.interop.formats.tokenizer.tokenizer_files import copy_imported, imported_tokenizer
from megatron_ext.interop.formats.weight_layout import Entry, entries, unused_tensors
from megatron_ext.interop.gguf.gguf_metadata import is_gguf
from megatron_ext.interop.gguf.gguf_model import open_gguf
from megatron_ext.interop.gguf.gguf_tensors import GGUFTensors
from megatron_ext.interop.output_directory import check_free, complete_directory
from megatron_ext.models.build_model import padded_vocab_size
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.checkpointer import IMPORTED

TOKENIZER_FOLDER = "tokenizer"
FLAGS_FILE = "model.yaml"

ReadFamilies = Callable[[dict[str, Any], SafetensorsFiles, ModelConfig, Tokenizer], "Families"]
"""A function that reads the families of an extended model, given config.json, tensors, base model and tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Families:
    """The parts of an import that belong to model families; empty for a plain base model (see `added_parts.py`)."""

    configurations: dict[str, Any] = field(default_factory=dict)
    """Section `families` of run_config.json."""

    groups: dict[str, Any] = field(default_factory=dict)
    """Config groups of the families' flags, by name."""

    parts: AddedParts | None = None
    """The parts that the families add to the base model."""

    entries: list[Entry] = field(default_factory=list)
    """Layout of further tensors, for a family that one of transformers' own classes implements."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """A model read from a Hugging Face directory or a GGUF file."""

    folder: Path
    """Directory with the model's small files: the Hugging Face directory, or a directory made from the GGUF file."""

    model: ModelConfig
    """Configuration of the base model."""

    tokenizer_config: TokenizerConfig
    """Configuration of the tokenizer; its paths point to the files in the Hugging Face directory."""

    tokenizer: Tokenizer
    """The tokenizer built from `tokenizer_config`."""

    vocab_size: int
    """Vocabulary size for `build_model`: the number of embedding rows or of tokenizer ids, whichever is larger."""

    state: HuggingFaceState
    """Unsharded tensors by global name; each is read from disk on access."""

    dtype: torch.dtype
    """Precision of the tensors: fp32 or bf16."""

    imported: Imported
    """Configuration and small files of the directory; a later export restores them."""

    families: Families
    """The parts that belong to model families; empty for a plain base model."""

    messages: tuple[str, ...]
    """Messages for the user about everything that could not be imported unchanged, one line each."""


def load_hf(
    model_dir: str | Path,
    *,
    seq_length: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    read_families: ReadFamilies | None = None,
) -> HuggingFaceModel:
    """Opens a Hugging Face model: reads its configuration and file headers and checks that they match; reads no
    tensors yet.

    Args:
        model_dir: local directory with config.json and safetensors of a model of one of `hf_config.ARCHITECTURES`; or
            such a model as a GGUF file.
        seq_length: tokens per training sequence; the default is the model's maximum position, but at most 4096.
        make_vocab_size_divisible_by: the number of embedding rows is padded to a multiple of this number; the default
            avoids padding.
        read_families: reads the families of an extended model, which was exported with a Python file of its own. If
            None, extended models are refused.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a `ModelConfig` cannot express the model.
    """
    folder, tensors = open_gguf(model_dir) if is_gguf(model_dir) else (Path(model_dir), None)
    config = read_config(folder)
    extended = is_extended(config) and read_families is not None
    has_others = has_text_part(config) and tensors is None
    content = base_config(config) if extended else text_config(config) if has_others else config
    source = to_model_config(
        content,
        str(folder / "config.json") if tensors is None else str(model_dir),
        seq_length=seq_length,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )
    model = source.model
    tokenizer_config, tokenizer, message = imported_tokenizer(folder, source.vocab_size)
    padded = padded_vocab_size(tokenizer.vocab_size, model, 1)
    families = Families()
    if extended and read_families is not None:
        families = read_families(config, SafetensorsFiles(folder), model, tokenizer)
    elif source.per_layer is not None:
        families = _of_gemma(model, source, tokenizer.vocab_size)
    files, notes = _files(folder, config if has_others else None, tensors)
    parts, unused = families.parts, unused_tensors(model) & files.names
    found = entries(model, source.vocab_size, padded, source.architecture) + families.entries
    besides = unused | (set(parts.buffers) if parts else set())
    state = HuggingFaceState(files, model, found + (parts.entries if parts else []), besides=besides)
    imported, left = Imported.read(folder, content)
    if unused:
        notes.append(f"{len(unused)} tensors compute keys and values that no layer uses; not imported")
    return HuggingFaceModel(
        folder=folder,
        model=model,
        tokenizer_config=tokenizer_config,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        state=state,
        dtype=state.precision,
        imported=imported,
        families=families,
        messages=(*notes, *source.messages, *([message] if message else []), *left_behind(left)),
    )


def _files(
    folder: Path, whole: dict[str, Any] | None, tensors: GGUFTensors | None
) -> tuple[TensorFiles, list[str]]:
    """Returns a model's tensors, and messages for the user.

    Args:
        folder: the Hugging Face directory.
        whole: config.json of a model that also has parts other than the language model; otherwise None.
        tensors: the tensors of a GGUF file, which are used instead of the directory's.
    """
    if tensors is not None:
        return tensors, list(tensors.messages)
    files = SafetensorsFiles(folder)
    if whole is None:
        return files, []
    text = TextTensors(files)
    return text, [f"the language model of {whole['model_type']}; {text.left_out} other tensors are left out"]


def import_checkpoint(
    model_dir: str | Path,
    save: str | Path,
    *,
    seq_length: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    read_families: ReadFamilies | None = None,
    message: Callable[[str], None] = print,
) -> HuggingFaceModel:
    """Converts a Hugging Face model to a checkpoint; after an error, no files are left at `save`.

    It writes these files:

        {save}/iter_0000000/, {save}/latest_checkpointed_iteration.txt      the checkpoint
        {save}/tokenizer/                                                   the tokenizer's files
        {save}/hugging_face/                                                other small files of `model_dir`
        {save}/model.yaml                                                   model and tokenizer flags, for --config

    For `model_dir`, `seq_length`, `make_vocab_size_divisible_by` and `read_families`, see `load_hf`.

    Args:
        save: directory for the checkpoint; must be empty or not exist yet.
        message: called with each line of text for the user.

    Returns:
        The model; its `tokenizer_config` points to the files in `save`.

    Raises:
        FileNotFoundError: as in `load_hf`.
        ValueError: as in `load_hf`; also if `save` is not empty.
        OSError: the checkpoint cannot be written.
    """
    require_one_process()
    check_free(save, "--save")
    found = load_hf(
        model_dir,
        seq_length=seq_length,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        read_families=read_families,
    )
    tokenizer = _in_checkpoint(found.tokenizer_config, found.folder, save)
    run_config = {
        "model": group_to_dict(found.model),
        "tokenizer": group_to_dict(tokenizer),
        "vocab_size": found.vocab_size,
        "tokenizer_fingerprint": found.tokenizer.fingerprint(),
        "families": found.families.configurations,
        **sections_of(found.families.groups),
        IMPORTED: found.imported.placed(save).as_json(),
    }
    # mcore's checkpoint writer needs a process group, even for one process; the seed has no effect.
    process_groups.initialize(ParallelConfig(), seed=1234)
    try:
        with complete_directory(save, "--save") as folder:
            copy_imported(found.tokenizer, found.folder, folder / TOKENIZER_FOLDER)
            found.imported.copy_files(folder)
            (folder / FLAGS_FILE).write_text(
                model_flags(found.model, tokenizer, **found.families.groups), encoding="utf-8"
            )
            write_checkpoint(folder, found.state, run_config)
    finally:
        process_groups.shutdown()
    for line in found.messages:
        message(f"note: {line}")
    return replace(found, tokenizer_config=tokenizer)


def _in_checkpoint(tokenizer: TokenizerConfig, folder: Path, save: str | Path) -> TokenizerConfig:
    """Returns the configuration of the tokenizer in `folder`, with paths changed to those of its files in `save`."""
    if tokenizer.tokenizer_model is None:
        return tokenizer
    # `within` is "." for a tokenizer that is a directory, and a file name for a SentencePiece model.
    within = os.path.relpath(tokenizer.tokenizer_model, folder)
    return replace(tokenizer, tokenizer_model=os.path.abspath(Path(save, TOKENIZER_FOLDER, within)))


def require_one_process() -> None:
    """Raises `ValueError` if `torchrun` has started several processes."""
    if process_groups.world_size() > 1:
        raise ValueError(
            f"conversion requires a single process (got {process_groups.world_size()}); start it without torchrun. "
            "The checkpoint can be loaded at any tensor- and pipeline-parallel size"
        )


def _of_gemma(model: ModelConfig, source: HFModel, vocab_size: int) -> Families:
    """Returns the per-layer embedding of a Gemma 4 or 3n model."""
    assert source.per_layer is not None
    family = family_of(source.per_layer, vocab_size)
    return Families(
        configurations={FAMILY: family},
        groups={FAMILY: family["settings"]},
        entries=per_layer_entries(model, source.per_layer, vocab_size, source.vocab_size),
    )


def model_flags(model: ModelConfig, tokenizer: TokenizerConfig, **groups: Any) -> str:
    """Returns the YAML text of an imported model's flags, for `--config`; `groups` holds the config groups of its
    families.
    """
    head = "# Imported model and tokenizer. Pass this file to a training script as --config; its flags override it.\n"
    return head + format_groups({"model": model, "tokenizer": tokenizer, **groups})
