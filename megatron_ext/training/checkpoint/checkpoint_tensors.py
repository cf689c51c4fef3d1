"""Loads model and optimizer tensors from megatron-core's `torch_dist` format, with megatron-core's reader.

`saving.tensor_writer` writes them.
"""

import contextlib
import warnings
from collections.abc import Callable, Container, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA
from megatron_ext.platform.collectives import gather_or_raise, merge_over_ranks, on_every_rank
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint.optimizer_state import MAIN_PARAM_PREFIX, PREFIX, OptimizerState

Wanted = Callable[[str, torch.Tensor, Container[str]], bool]
"""Decides whether to read a tensor. Arguments: the tensor's name in the checkpoint, the model's tensor, and the names
of all tensors in the checkpoint.
"""

Keeps = Callable[[str, torch.Tensor], bool]
"""Decides whether to save a tensor. Arguments: the tensor's name in the checkpoint, and the model's tensor."""

_WORD_EMBEDDING = "embedding.word_embeddings.weight"


def model_state(
    models: list[GPTModel],
    keeps: Keeps | None = None,
    rename: Callable[[str], str] | None = None,
) -> ShardedStateDict:
    """Returns the sharded state dict of this rank's chunks; its names do not depend on the parallel layout.

    Args:
        models: the chunks, unwrapped.
        keeps: called with a tensor's global name and the tensor; returns whether to include it. None includes all.
        rename: turns a tensor's global name into its name in the checkpoint, which is then passed to `keeps`. If
            `rename` is given, entries that are not tensors are omitted.
    """
    states = {}
    for index, model in enumerate(models):
        state = model.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        if rename is not None:
            state = {name: value for name, value in state.items() if _is_tensor(value)}
            for value in state.values():
                value.key = rename(value.key)
        if keeps is not None:
            state = {
                name: value
                for name, value in state.items()
                if not _is_tensor(value) or keeps(value.key, value.data)
            }
        states[f"model{index}"] = state
    return states


def read_into(
    models: list[GPTModel],
    folder: Path,
    *,
    wanted: Wanted | None = None,
    rename: Callable[[str], str] | None = None,
    whole: bool = True,
    same_vocabulary: bool,
) -> None:
    """Reads a checkpoint's tensors into a model; collective.

    Args:
        models: this rank's chunks, unwrapped.
        folder: the checkpoint's directory; check it with `verify` first.
        wanted: chooses the tensors to read; None reads every tensor of the model.
        rename: as in `model_state`.
        whole: whether it is an error if the checkpoint contains model tensors that this model lacks.
        same_vocabulary: whether run and checkpoint have the same vocabulary size; the padding of the embedding may then
            differ.

    Raises:
        ValueError: model and checkpoint differ; the message names the tensor.
    """
    stored = stored_shapes(folder)
    keeps = None if wanted is None else lambda name, value: wanted(name, value, stored)
    state = model_state(models, keeps, rename)
    check(state, stored, folder, same_vocabulary=same_vocabulary, whole=whole)
    _load_model_state(models, read(state, folder), strict=wanted is None)


def load_optimizer(
    optimizer: OptimizerState, folder: Path, step: int, *, whole: bool = True, same_vocabulary: bool
) -> None:
    """Reads the optimizer's tensors from a checkpoint; load the model first. Collective.

    Args:
        optimizer: the optimizer whose state is filled.
        folder: the checkpoint's directory.
        step: Adam's step count in the checkpoint.
        whole: whether it is an error if the checkpoint lacks a parameter's state; otherwise that state is unchanged.
        same_vocabulary: as in `read_into`.
    """
    stored = stored_shapes(folder)
    main_params = any(name.startswith(MAIN_PARAM_PREFIX) for name in stored)
    held = optimizer.sharded(is_loading=True, with_main_params=main_params)
    if not whole:
        held = {number: part for number, part in held.items() if part["exp_avg"].key in stored}
    check({"optimizer": held}, stored, folder, same_vocabulary=same_vocabulary, whole=False)
    optimizer.restore(read({"optimizer": held}, folder)["optimizer"], step)


def _load_model_state(models: list[GPTModel], state: ShardedStateDict, *, strict: bool) -> None:
    """Loads a filled state dict into the chunks; `strict` requires every tensor of the model."""
    for index, model in enumerate(models):
        found = model.load_state_dict(state[f"model{index}"], strict=False)
        wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if not _is_extra(name)]
        assert not (strict and wrong), (
            f"{wrong[0]}: not in both model and checkpoint, although `check` found them equal"
        )


def read(state: ShardedStateDict, folder: Path) -> dict[Any, Any]:
    """Returns a sharded state dict filled with the checkpoint's tensors; collective. Call `check` first.

    The state dict may be empty on some ranks. Entries `_extra_state` that the checkpoint lacks are omitted: only
    Transformer Engine's modules have them (for FP8).
    """
    state = _with_stored_extras(state, folder)
    if not any(gather_or_raise(lambda: any(True for _ in nested_values(state)))):
        return state
    with without_reader_warnings():
        loaded = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    return {**{name: {} for name in state}, **loaded}  # megatron-core omits empty parts


@contextlib.contextmanager
def without_reader_warnings() -> Iterator[None]:
    """Context manager that suppresses torch's warnings about the way in which megatron-core calls torch's loader."""
    with warnings.catch_warnings():
        # Up to 0.17, megatron-core calls the loader by a deprecated name; from 0.18 on, with the old order of
        # arguments.
        warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "The argument order of load has been changed")
        # From 0.18 on, every rank reads its own part separately, about which torch warns although the engine intends
        # it.
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def verify(folder: Path) -> None:
    """Compares a checkpoint's files with their checksums; every rank checks a share of the files. Collective.

    Raises:
        ValueError: a file is missing or damaged.
    """
    on_every_rank(lambda: files.verify_checkpoint(folder, dist.get_rank(), dist.get_world_size()))


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the global shapes of a checkpoint's tensors by name. Collective.

    Call `verify` first, because this function unpickles a file.
    """

    def own() -> dict[str, tuple[int, ...]]:
        stored = _stored(folder).values()
        return {value.key: tuple(value.global_shape) for value in stored if isinstance(value, ShardedTensor)}

    return on_every_rank(own)


def _stored(folder: Path) -> dict[str, ShardedTensor | ShardedObject]:
    """Returns descriptions of a checkpoint's tensors and objects, without their data."""
    status = (folder / ".metadata").stat()
    return _parsed(folder, (status.st_ino, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1)
def _parsed(folder: Path, identity: tuple[int, ...]) -> dict[str, ShardedTensor | ShardedObject]:
    # The result is cached: for a large model, parsing takes seconds, and a load needs the result for the model and
    # for the optimizer.
    return dict(load_sharded_metadata(str(folder)))


def check(
    state: ShardedStateDict,
    stored: dict[str, tuple[int, ...]],
    folder: Path,
    *,
    same_vocabulary: bool,
    whole: bool = True,
) -> None:
    """Checks that the checkpoint contains every tensor to load, in the required shape; collective.

    Args:
        state: the sharded state dict to load.
        stored: global shapes of the checkpoint's tensors, by name.
        folder: the checkpoint's directory, named in errors.
        same_vocabulary: whether run and checkpoint have the same vocabulary size; the padding of the embedding may then
            differ.
        whole: whether it is an error if the checkpoint contains model tensors that `state` lacks.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape; the message names it.
    """
    wanted = {shard.key: tuple(shard.global_shape) for shard in _shards(state)}
    everywhere = merge_over_ranks(wanted)
    for name, shape in sorted(everywhere.items()):
        if name not in stored:
            hint = "; add --no-load-optim" if name.startswith(PREFIX) else ""
            raise ValueError(f"{folder}: contains no tensor {name}, which this run needs{hint}")
        if stored[name] == shape or (
            same_vocabulary and stored[name][1:] == shape[1:] and _is_vocabulary(name)
        ):
            continue
        if _is_vocabulary(name):
            raise ValueError(
                f"{folder}: the vocabulary has {stored[name][0]} rows, but this run's tokenizer needs {shape[0]}; "
                "use the checkpoint's tokenizer (--tokenizer-type, --tokenizer-model, --vocab-file)"
            )
        raise ValueError(
            f"{folder}: tensor {name} has shape {list(stored[name])}, but this run needs {list(shape)}"
        )
    extra = [name for name in stored if not name.startswith(PREFIX) and name not in everywhere]
    if extra and whole:
        raise ValueError(
            f"{folder}: contains {len(extra)} tensors that this run's model does not have, such as {extra[0]}"
        )


def _with_stored_extras(state: ShardedStateDict, folder: Path) -> ShardedStateDict:
    """Returns the state dict without the `_extra_state` objects that the checkpoint does not contain."""
    if not any(isinstance(value, ShardedObject) for value in nested_values(state)):
        return state
    objects = {value.unique_key for value in _stored(folder).values() if isinstance(value, ShardedObject)}

    def is_there(name: object, value: object) -> bool:
        return not (isinstance(value, ShardedObject) and _is_extra(str(name))) or value.unique_key in objects

    def kept(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {name: kept(value) for name, value in part.items() if is_there(name, value)}

    return kept(state)


def _is_tensor(value: object) -> bool:
    return isinstance(value, ShardedTensor | ShardedTensorFactory)


def _is_extra(name: str) -> bool:
    return name.endswith("_extra_state")


def _is_vocabulary(name: str) -> bool:
    return name.endswith((_WORD_EMBEDDING, "output_layer.weight", "output_layer.bias"))


def _shards(state: ShardedStateDict) -> list[ShardedTensor]:
    found = []
    for value in nested_values(state):
        pieces = [value]
        if isinstance(value, ShardedTensorFactory):
            built = value.build()
            pieces = list(nested_values(built)) if isinstance(built, dict | list) else [built]
        found += [piece for piece in pieces if isinstance(piece, ShardedTensor)]
    return found
