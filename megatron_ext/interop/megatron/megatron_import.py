"""Imports a Megatron-LM checkpoint into a checkpoint of this package, without running code that its files name."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.tokenizer_config import TokenizerConfig, tokenizer_flags
from megatron_ext.config.serialize import group_to_dict
from megatron_ext.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ext.interop.checkpoint_without_model import write_checkpoint
from megatron_ext.interop.hf_import import FLAGS_FILE, model_flags, require_one_process
from megatron_ext.interop.megatron.megatron_arguments import read_model
from megatron_ext.interop.megatron.megatron_directory import find_megatron_checkpoint, read_common
from megatron_ext.interop.megatron.megatron_names import find_tensors
from megatron_ext.interop.megatron.megatron_progress import MegatronProgress, read_progress
from megatron_ext.interop.megatron.megatron_state import MegatronState, check_optimizer_format, has_buffers
from megatron_ext.interop.megatron.torch_dist_files import TorchDistFiles
from megatron_ext.interop.output_directory import check_free, complete_directory
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.loss_scale import LOSS_SCALE

SECTION = "megatron_lm"
"""Section of `run_config` with the Megatron-LM run's arguments of the schedule and of Adam."""

_WORD_EMBEDDING = "embedding.word_embeddings.weight"
_TOKENIZER_FIELDS = (
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "tokenizer_special_tokens",
    "tiktoken_pattern",
)


@dataclass(frozen=True, kw_only=True)
class MegatronModel:
    """A model in a Megatron-LM checkpoint."""

    folder: Path
    """Directory of the checkpoint."""

    model: ModelConfig
    """Configuration of the base model."""

    rows: int
    """Number of rows of the word embedding."""

    tokenizer_config: TokenizerConfig
    """Configuration of the tokenizer."""

    tokenizer: Tokenizer
    """The tokenizer built from `tokenizer_config`."""

    state: MegatronState
    """Unsharded tensors by the names of this package; each is read from disk on access."""

    progress: MegatronProgress | None
    """The run's progress, if the optimizer is read; otherwise None."""

    messages: tuple[str, ...]
    """Messages for the user about everything that could not be imported unchanged, one line each."""


def load_megatron(
    model_dir: str | Path,
    *,
    ckpt_step: int | None = None,
    with_optimizer: bool = False,
    seq_length: int | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> MegatronModel:
    """Opens a Megatron-LM checkpoint: reads its arguments and its list of tensors and checks that they match; reads
    no tensors yet.

    Args:
        model_dir: a directory of checkpoints, or of one checkpoint, in the format `torch_dist`.
        ckpt_step: the step; None for the step in the tracker file.
        with_optimizer: whether to read Adam's state, the schedule and the progress.
        seq_length: tokens per training sequence; the default is the checkpoint's.
        tokenizer: fields of `TokenizerConfig`; all others are taken from the checkpoint's arguments.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or a `ModelConfig` cannot express the model.
    """
    folder = find_megatron_checkpoint(model_dir, ckpt_step)
    files = TorchDistFiles(folder)
    common, arguments, source = read_common(files)
    if _WORD_EMBEDDING not in files.tensors:
        raise ValueError(
            f"{folder}: contains no tensor {_WORD_EMBEDDING}, so this is not a checkpoint of a GPT model"
        )
    rows = files.tensors[_WORD_EMBEDDING].shape[0]
    config = _tokenizer_config(arguments, tokenizer or {}, source)
    built = _build_tokenizer(config, rows, folder)
    model, messages = read_model(arguments, built.vocab_size, rows, source, seq_length=seq_length)
    progress = None
    if with_optimizer:
        check_optimizer_format(files, folder)
        progress = read_progress(
            {**common, "optimizer": _optimizer_objects(files, common)}, arguments, source
        )
    return MegatronModel(
        folder=folder,
        model=model,
        rows=rows,
        tokenizer_config=config,
        tokenizer=built,
        state=MegatronState(
            files,
            find_tensors(model, rows, files.tensors, str(folder)),
            arguments,
            with_optimizer=with_optimizer,
        ),
        progress=progress,
        messages=tuple(messages),
    )


def import_megatron(model_dir: str | Path, save: str | Path, **options: Any) -> MegatronModel:
    """Converts a Megatron-LM checkpoint to a checkpoint of this package; after an error, no files are left at `save`.

    Writes the checkpoint, its tracker file, and `model.yaml` with the flags of model and tokenizer, for --config.

    Args:
        model_dir: as in `load_megatron`.
        save: directory for the checkpoint; must be empty or not exist yet.
        **options: as in `load_megatron`.

    Raises:
        FileNotFoundError, ValueError: as in `load_megatron`; also if `save` is not empty.
        OSError: the checkpoint cannot be written.
    """
    require_one_process()
    check_free(save, "--save")
    found = load_megatron(model_dir, **options)
    run_config: dict[str, Any] = {
        "model": group_to_dict(found.model),
        "tokenizer": group_to_dict(found.tokenizer_config),
        "vocab_size": found.tokenizer.vocab_size,
        "tokenizer_fingerprint": found.tokenizer.fingerprint(),
        "families": {},
    }
    run_state: dict[str, Any] = {}
    if found.progress is not None:
        run_config[SECTION] = found.progress.arguments
        run_state = {
            "progress": asdict(found.progress.progress),
            "optimizer_step": found.progress.optimizer_step,
            "scheduler": found.progress.scheduler,
        }
        if found.progress.loss_scale is not None:
            run_state[LOSS_SCALE] = found.progress.loss_scale
    # mcore's checkpoint writer needs a process group, even for one process; the seed has no effect.
    process_groups.initialize(ParallelConfig(), seed=1234)
    try:
        with complete_directory(save, "--save") as folder:
            (folder / FLAGS_FILE).write_text(
                model_flags(found.model, found.tokenizer_config), encoding="utf-8"
            )
            write_checkpoint(folder, found.state, run_config, run_state)
    finally:
        process_groups.shutdown()
    return found


def _optimizer_objects(files: TorchDistFiles, common: Mapping[str, Any]) -> Any:
    """Returns the optimizer's state without its tensors: parameter groups and loss scaler."""
    if not has_buffers(files):
        return common.get("optimizer")
    # With flat buffers, every group of ranks stores its own copy; the copies are equal.
    found: dict[str, Any] = {}
    for name in sorted(files.objects):
        match = re.match(r"optimizer\.distributed\.[^.]*\.(optimizer|grad_scaler)/", name)
        if match and match[1] not in found:
            found[match[1]] = files.read_object(name)[0]
    return found or common.get("optimizer")


def _tokenizer_config(arguments: Mapping[str, Any], given: Mapping[str, Any], source: str) -> TokenizerConfig:
    chosen = given.get("tokenizer_type")
    kind = chosen or arguments.get("tokenizer_type")
    if not isinstance(kind, str) or tokenizer_flags(kind) is None:
        raise ValueError(
            f"{source}: tokenizer_type {kind}: not supported; give --tokenizer-type and its files"
        )
    stored = {name: arguments.get(name) for name in _TOKENIZER_FIELDS}
    if kind in ("NullTokenizer", "TikTokenizer"):
        stored["vocab_size"] = arguments.get("vocab_size")
    if chosen is None and kind == "NullTokenizer" and "null_tokenizer_eod_id" in arguments:
        stored["vocab_size"] = _null_end(arguments, source)
    values = {name: value for name, value in stored.items() if value is not None} if chosen is None else {}
    values |= {name: value for name, value in given.items() if value is not None}
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        if name in values:
            values[name] = os.path.abspath(values[name])
    if values.get("tokenizer_special_tokens") is not None:
        values["tokenizer_special_tokens"] = tuple(values["tokenizer_special_tokens"])
    return TokenizerConfig(**{**values, "tokenizer_type": kind})


def _null_end(arguments: Mapping[str, Any], source: str) -> int:
    """Returns the id that ends a document: the last of the --vocab-size ids, as in Megatron-LM from 0.18 on."""
    last = int(arguments["vocab_size"]) - 1
    end = arguments["null_tokenizer_eod_id"]
    if end not in (None, last):
        raise ValueError(
            f"{source}: --null-tokenizer-eod-id {end}: must be the last id, {last}; give "
            "--tokenizer-type and its files"
        )
    return last


def _build_tokenizer(config: TokenizerConfig, rows: int, folder: Path) -> Tokenizer:
    try:
        tokenizer = build_tokenizer(config)
    except (FileNotFoundError, ValueError) as error:
        flags = tokenizer_flags(config.tokenizer_type)
        raise type(error)(f"{error}; the checkpoint was trained with this tokenizer: give {flags}") from None
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{folder}: the vocabulary has {rows} rows, but the tokenizer has {tokenizer.vocab_size} ids; give the "
            "tokenizer with which the model was trained (--tokenizer-type and its files)"
        )
    return tokenizer
