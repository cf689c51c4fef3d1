"""A local Hugging Face directory of the Llama family as a model of ours: in memory, or as a checkpoint.

Nothing is downloaded, and no code of the directory is run.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig
from megatron_ext.config.serialize import format_groups, group_to_dict
from megatron_ext.data.tokenizers import Tokenizer
from megatron_ext.interop.checkpoint_without_model import write_checkpoint
from megatron_ext.interop.formats.hf_config import to_model_config
from megatron_ext.interop.formats.hf_files import HuggingFaceState, SafetensorsFiles, read_config
from megatron_ext.interop.formats.imported_model import Imported, left_behind
from megatron_ext.interop.formats.tokenizer_files import copy_imported, imported_tokenizer
from megatron_ext.interop.formats.weight_layout import entries
from megatron_ext.interop.output_directory import check_free, complete_directory
from megatron_ext.models.build_model import padded_vocab_size
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.checkpointer import IMPORTED

TOKENIZER_FOLDER = "tokenizer"
FLAGS_FILE = "model.yaml"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """A model of a Hugging Face directory, in our terms."""

    model: ModelConfig
    """The base model's configuration."""

    tokenizer_config: TokenizerConfig
    """Its tokenizer, with files in the directory."""

    tokenizer: Tokenizer
    """The same, built."""

    vocab_size: int
    """What `build_model` takes: embeddings, or the tokenizer's ids where these are more."""

    state: HuggingFaceState
    """The tensors by global name, whole, each read when it is asked for."""

    dtype: torch.dtype
    """fp32 or bf16, the precision of the tensors."""

    imported: Imported
    """What the directory holds beside the tensors and the tokenizer, for an export."""

    messages: tuple[str, ...]
    """For the user: what was not taken over as it stands."""


def load_hf(
    model_dir: str | Path,
    *,
    seq_length: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
) -> HuggingFaceModel:
    """Reads a directory's configuration and the headers of its files, and checks that they fit; no tensor is read yet.

    Args:
        model_dir: a local directory with config.json and safetensors; Llama, Mistral, Qwen2 or Qwen3.
        seq_length: tokens of a training sequence; by default the model's longest position, at most 4096.
        make_vocab_size_divisible_by: of the embedding's rows; by default such that nothing is padded.

    Raises:
        FileNotFoundError, ValueError: one line that names what is missing, damaged, unknown or does not fit.
    """
    content = read_config(model_dir)
    source = to_model_config(
        content,
        str(Path(model_dir) / "config.json"),
        seq_length=seq_length,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )
    model = source.model
    config, tokenizer, message = imported_tokenizer(model_dir, source.vocab_size)
    padded = padded_vocab_size(tokenizer.vocab_size, model, 1)
    state = HuggingFaceState(SafetensorsFiles(model_dir), model, entries(model, source.vocab_size, padded))
    imported, left = Imported.read(model_dir, content)
    return HuggingFaceModel(
        model=model,
        tokenizer_config=config,
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        state=state,
        dtype=state.dtype,
        imported=imported,
        messages=(*source.messages, *([message] if message else []), *left_behind(left)),
    )


def import_checkpoint(
    model_dir: str | Path,
    save: str | Path,
    *,
    seq_length: int | None = None,
    make_vocab_size_divisible_by: int | None = None,
    message: Callable[[str], None] = print,
) -> HuggingFaceModel:
    """Writes a Hugging Face model as a checkpoint, complete or not at all.

        {save}/iter_0000000/, {save}/latest_checkpointed_iteration.txt      the checkpoint
        {save}/tokenizer/                                                   the tokenizer's files
        {save}/hugging_face/                                                other small files beside the weights
        {save}/model.yaml                                                   model and tokenizer as flags, for --config

    Args:
        model_dir: see `load_hf`.
        save: the directory of checkpoints; missing or empty.
        seq_length: see `load_hf`.
        make_vocab_size_divisible_by: see `load_hf`.
        note: takes lines for the user.

    Returns:
        The model, its tokenizer's files in the checkpoint.

    Raises:
        FileNotFoundError, ValueError: as `load_hf`, or `save` holds something.
        OSError: it cannot be written.
    """
    require_one_process()
    check_free(save, "--save")
    found = load_hf(
        model_dir, seq_length=seq_length, make_vocab_size_divisible_by=make_vocab_size_divisible_by
    )
    tokenizer = found.tokenizer_config
    if tokenizer.tokenizer_model is not None:
        within = os.path.relpath(tokenizer.tokenizer_model, model_dir)  # of a SentencePiece model, else "."
        place = os.path.abspath(Path(save, TOKENIZER_FOLDER, within))
        tokenizer = replace(tokenizer, tokenizer_model=place)
    run_config = {
        "model": group_to_dict(found.model),
        "tokenizer": group_to_dict(tokenizer),
        "vocab_size": found.vocab_size,
        "tokenizer_fingerprint": found.tokenizer.fingerprint(),
        "families": {},
        IMPORTED: found.imported.placed(save).as_json(),
    }
    process_groups.initialize(ParallelConfig(), seed=1234)
    try:
        with complete_directory(save, "--save") as folder:
            copy_imported(found.tokenizer, Path(model_dir), folder / TOKENIZER_FOLDER)
            found.imported.copy_files(folder)
            (folder / FLAGS_FILE).write_text(_flags(found.model, tokenizer), encoding="utf-8")
            write_checkpoint(folder, found.state, run_config)
    finally:
        process_groups.shutdown()
    for line in found.messages:
        message(f"note: {line}")
    return replace(found, tokenizer_config=tokenizer)


def require_one_process() -> None:
    """Raises `ValueError` under `torchrun` with several processes."""
    if process_groups.world_size() > 1:
        raise ValueError(
            f"conversion runs in one process, not {process_groups.world_size()}; "
            "what it writes can be loaded at any tensor- and pipeline-parallel size"
        )


def _flags(model: ModelConfig, tokenizer: TokenizerConfig) -> str:
    head = (
        "# Imported model and tokenizer, for a training script's --config; flags on its command line win.\n"
    )
    return head + format_groups({"model": model, "tokenizer": tokenizer})
