"""Reads and writes a checkpoint as plain tensors by global name, in one process and without building a model.

A tensor's global name does not depend on the parallel layout. An imported model is stored as a checkpoint of step 0,
without optimizer, scheduler or random state. Every tool that loads a model can load such a checkpoint, in any parallel
layout; to train from it, pass `--finetune`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.checkpoint.optimizer_state import PREFIX
from megatron_ext.training.checkpoint.saving import tensor_writer


class StoredState(Protocol):
    """Unsharded tensors by global name, with shapes and dtypes; every access returns a new tensor."""

    def __getitem__(self, name: str) -> torch.Tensor: ...

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...


def write_checkpoint(
    root: Path,
    state: StoredState,
    run_config: dict[str, Any],
    run_state: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint; needs an initialized process group of size 1, and memory for one tensor.

    Args:
        root: directory that holds all checkpoints of a run.
        state: unsharded tensors by global name.
        run_config: content of run_config.json: sections `model` and `tokenizer`, `vocab_size`,
            `tokenizer_fingerprint` and `families`.
        run_state: `progress`, `optimizer_step` and `scheduler` of state.json; if None, the checkpoint has step 0 and
            no optimizer state.

    Returns:
        The directory of the new checkpoint, such as `root/iter_0000000`.

    Raises:
        OSError: the checkpoint could not be written.
    """
    progress: dict[str, Any] = {
        "progress": asdict(TrainingProgress()),
        "optimizer_step": None,
        "scheduler": None,
        **(run_state or {}),
    }
    name = files.checkpoint_name(progress["progress"]["iteration"])
    folder = files.begin(root, name)
    shards = {
        name: ShardedTensor.from_rank_offsets(
            name, torch.empty(state.shape(name), dtype=state.dtype(name), device="meta")
        )
        for name in state
    }
    digests = tensor_writer.write(
        {**shards, **_extra_states(state)}, folder, lambda name, _: state[name].contiguous()
    )
    files.write_text(folder / files.STATE, json.dumps({**progress, "families": {}, "cut": {}}, indent=1))
    files.write_text(folder / files.RUN_CONFIG, json.dumps(run_config, indent=1))
    # Checksums are written last, to cover all files; publishing the checkpoint then marks it as complete.
    rest = [path.name for path in folder.iterdir() if path.is_file() and path.name not in digests]
    files.write_checksums(folder, {**digests, **files.digests(folder, rest)})
    files.publish(root, name)
    return root / name


def _extra_states(names: Iterable[str]) -> dict[str, ShardedObject]:
    """Returns the `_extra_state` that megatron-core expects for every linear layer; it holds data only with FP8."""
    layers = [
        name.removesuffix("weight")
        for name in names
        if ".linear_" in name and name.endswith("weight") and not name.startswith(PREFIX)
    ]
    keys = [f"{layer}_extra_state" for layer in layers]
    return {key: ShardedObject(key, None, (1,), (0,)) for key in keys}


class CheckpointState(Mapping[str, torch.Tensor]):
    """Maps names to the tensors of one or more checkpoints; a tensor is read when it is accessed.

    Needs a process group of size 1. The constructor compares all files with their checksums.

    Args:
        *folders: directory of each checkpoint. A tensor is read from the first checkpoint that has it, so a checkpoint
            that was trained on top of a base must be listed before the base.
        only: names of the tensors to expose; None exposes all.
        with_optimizer: whether to expose the optimizer's tensors too.

    Raises:
        ValueError: a checkpoint is damaged.
    """

    def __init__(self, *folders: Path, only: set[str] | None = None, with_optimizer: bool = False) -> None:
        self._stored: dict[str, tuple[Path, ShardedTensor]] = {}
        for folder in folders:
            files.verify_checkpoint(folder)
            for name, shard in dist_checkpointing.load_tensors_metadata(str(folder)).items():
                if name.startswith(PREFIX) and not with_optimizer:
                    continue
                if only is None or name in only:
                    self._stored.setdefault(name, (folder, shard))

    def __getitem__(self, name: str) -> torch.Tensor:
        folder, stored = self._stored[name]
        empty = torch.empty(stored.global_shape, dtype=stored.dtype)
        shard = ShardedTensor.from_rank_offsets(name, empty)
        tensor: torch.Tensor = checkpoint_tensors.read({name: shard}, folder)[name]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the unsharded shape of a tensor, from the checkpoint's metadata."""
        return tuple(self._stored[name][1].global_shape)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored dtype of a tensor, from the checkpoint's metadata."""
        dtype: torch.dtype = self._stored[name][1].dtype
        return dtype
