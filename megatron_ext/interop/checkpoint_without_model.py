"""Our checkpoints as plain tensors by global name: written without a run, read without a model; one process.

A checkpoint of an imported model is that of step 0 of a run that has not begun: no optimizer, no schedule, no random
state. Everything that loads a model loads it, at any parallel layout; a run takes it up with `--finetune`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import checkpoint_tensors
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.checkpoint.optimizer_state import PREFIX


def write_checkpoint(root: Path, state: Mapping[str, torch.Tensor], run_config: dict[str, Any]) -> Path:
    """Writes a checkpoint of step 0; needs a process group of one.

    Args:
        root: the directory of checkpoints.
        state: whole tensors by global name.
        run_config: sections `model` and `tokenizer`, `vocab_size`, `tokenizer_fingerprint` and `families`.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: it could not be written.
    """
    name = files.checkpoint_name(0)
    folder = files.begin(root, name)
    shards = {name: ShardedTensor.from_rank_offsets(name, state[name]) for name in state}
    checkpoint_tensors.write({**shards, **_extra_states(state)}, folder)
    progress: dict[str, Any] = {
        "progress": asdict(TrainingProgress()),
        "optimizer_step": None,
        "scheduler": None,
    }
    files.write_text(folder / files.STATE, json.dumps({**progress, "families": {}, "cut": {}}, indent=1))
    files.write_text(folder / files.RUN_CONFIG, json.dumps(run_config, indent=1))
    written = [path.name for path in folder.iterdir() if path.is_file()]
    files.write_checksums(folder, files.digests(folder, written))
    files.publish(root, name)
    return root / name


def _extra_states(names: Iterable[str]) -> dict[str, ShardedObject]:
    """The engine expects beside each linear layer's weight an object that holds nothing but for FP8."""
    layers = [name.removesuffix("weight") for name in names if ".linear_" in name and name.endswith("weight")]
    keys = [f"{layer}_extra_state" for layer in layers]
    return {key: ShardedObject(key, None, (1,), (0,)) for key in keys}


class CheckpointState(Mapping[str, torch.Tensor]):
    """A checkpoint's model, tensor by tensor as it is asked for; needs a process group of one."""

    def __init__(self, *folders: Path, only: set[str] | None = None) -> None:
        """Args:
        *folders: checkpoints' own directories, all files of which are compared with their checksums first. A tensor
            is taken from the first that has it: what was trained on top of a base, then the base.
        only: leave out all tensors but these.

        Raises:
            ValueError: a checkpoint is damaged.
        """
        self._stored: dict[str, tuple[Path, ShardedTensor]] = {}
        for folder in folders:
            files.verify_checkpoint(folder)
            for name, shard in dist_checkpointing.load_tensors_metadata(str(folder)).items():
                if not name.startswith(PREFIX) and (only is None or name in only):
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
        """Whole shape of a tensor, without reading it."""
        return tuple(self._stored[name][1].global_shape)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""
        dtype: torch.dtype = self._stored[name][1].dtype
        return dtype
