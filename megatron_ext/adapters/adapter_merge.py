"""Merges a run's LoRA adapters into the base weights, tensor by tensor and without building the model.

The result is a checkpoint without adapters that needs no other checkpoint. It can be trained, evaluated and exported
like any other checkpoint of its model families.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megatron_ext.adapters.adapter_family import ADAPTER, AdapterFamily
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.serialize import group_in
from megatron_ext.interop.checkpoint_without_model import CheckpointState, write_checkpoint
from megatron_ext.interop.hf_import import require_one_process
from megatron_ext.interop.output_directory import check_free, complete_directory
from megatron_ext.lora.adapter_config import AdapterConfig
from megatron_ext.models.base_parameters import ADAPTERS
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpointer import read_run_config


class MergedState(Mapping[str, torch.Tensor]):
    """Maps the name of a tensor to its value after every adapter is added to its weight: W + (alpha / r) B A."""

    def __init__(self, state: CheckpointState, scale: float) -> None:
        """Args:
        state: the tensors of the run, and of the frozen models on which the run is based.
        scale: alpha / r.
        """
        self._state = state
        self._scale = scale
        self._names = [name for name in state if ADAPTERS not in name.split(".")]

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._state[name]
        adapter = f"{name.removesuffix('weight')}{ADAPTERS}.{ADAPTER}."
        if not name.endswith("weight") or f"{adapter}A" not in self._state:
            return weight
        factors = (self._state[f"{adapter}{factor}"].float() for factor in "BA")
        return (weight.float() + self._scale * torch.mm(*factors)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the unsharded shape of a tensor."""
        return self._state.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor."""
        return self._state.dtype(name)


def merge_adapters_of_run(load: str, save: str, *, ckpt_step: int | None = None) -> Path:
    """Writes a checkpoint of step 0 with merged weights; after an error, `save` is left without files.

    Args:
        load: a directory of checkpoints with adapters, or the directory of one checkpoint.
        save: directory for the checkpoint; must be empty or not exist yet.
        ckpt_step: step to merge; the default is the newest.

    Returns:
        The directory of the merged model's checkpoint.

    Raises:
        ValueError: the checkpoint has no LoRA adapters, or is damaged; or `save` is not empty.
        OSError: the checkpoint of the frozen model is missing, or the result cannot be written.
    """
    require_one_process()
    check_free(save, "--save")
    stored = read_run_config(load, ckpt_step)
    if AdapterFamily.name not in stored["families"]:
        raise ValueError(
            f"--load {load}: has no adapters to merge; requires a checkpoint of a run with --lora-rank"
        )
    shape = AdapterFamily(group_in(AdapterConfig, stored["families"][AdapterFamily.name], "settings")).shape
    folders, base = [BaseCheckpoint.find(load, ckpt_step).folder], BaseCheckpoint.of_run(stored)
    while base is not None:
        folders.append(base.folder)
        base = BaseCheckpoint.of_run(base.run_config())
    families = {name: value for name, value in stored["families"].items() if name != AdapterFamily.name}
    run_config = stored | {"families": families, "adapters": {}, "base_checkpoint": None}
    # mcore's checkpoint writer needs a process group, even for one process; the seed has no effect.
    process_groups.initialize(ParallelConfig(), seed=1234)
    try:
        with complete_directory(save, "--save") as folder:
            written = write_checkpoint(
                folder, MergedState(CheckpointState(*folders), shape.scale), run_config
            )
    finally:
        process_groups.shutdown()
    return Path(save) / written.name
