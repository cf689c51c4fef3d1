"""Checkpoints move between Transformer Engine's modules and others, which differ in `_extra_state` alone.

Transformer Engine is not installed here. FAKE: the tests give this project's norms and core attention an `_extra_state`
as Transformer Engine's have it, bytes in a uint8 tensor, so that the engine's own state dict has it too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.interop.checkpoint_without_model import CheckpointState, write_checkpoint
from megatron_ext.models.ops.attention import SDPAttention
from megatron_ext.models.ops.norm import LayerNorm, RMSNorm
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint.checkpointer import load_weights, read_run_config

_LAYOUTS = {1: ParallelConfig(), 2: ParallelConfig(tensor_model_parallel_size=2)}
_STATE = torch.tensor([7, 7, 7], dtype=torch.uint8)


def _with_extra_state() -> list[torch.Tensor]:
    """Gives the modules of this process an extra state; returns a list of those that are set."""
    found: list[torch.Tensor] = []
    for module in (LayerNorm, RMSNorm, SDPAttention):
        module.get_extra_state = lambda self: _STATE.clone()  # type: ignore[method-assign]
        module.set_extra_state = lambda self, state: found.append(state)  # type: ignore[method-assign]
    return found


def _settings(world_size: int, **checkpoint: Any) -> RunSettings:
    return RunSettings(
        parallel=_LAYOUTS[world_size], checkpoint=CheckpointConfig(**checkpoint), micro_batch_size=2
    )


def _save(folder: str, world_size: int, extra: bool) -> list[float]:
    if extra:
        _with_extra_state()
    run = TinyRun(_settings(world_size, save=folder))
    run.train(2)
    run.save()
    return run.train(2)


def _load(folder: str, world_size: int, extra: bool) -> tuple[list[float], list[torch.Tensor]]:
    found = _with_extra_state() if extra else []
    run = TinyRun(_settings(world_size, load=folder))
    load_weights(folder, list(run.chunks), [])  # as tools do
    return run.train(2), found


def _stored_extras(folder: Path) -> list[str]:
    stored = load_sharded_metadata(str(folder / "iter_0000002")).values()
    return [value.key for value in stored if isinstance(value, ShardedObject)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("saved", "loaded"), [(False, True), (True, False), (True, True)])
def test_a_checkpoint_loads_with_and_without_extra_states(
    saved: bool, loaded: bool, world_size: int, tmp_path: Path
) -> None:
    expected = run_distributed(_save, world_size, str(tmp_path), world_size, saved)
    norms = [name for name in _stored_extras(tmp_path) if "layernorm" in name]
    assert bool(norms) == saved
    for rank, (losses, found) in enumerate(
        run_distributed(_load, world_size, str(tmp_path), world_size, loaded)
    ):
        assert losses == expected[rank]
        assert bool(found) == (saved and loaded)
        assert all(torch.equal(state, _STATE) for state in found)


def _import(folder: str) -> float:
    """Writes the model of step 2 as an import does, and loads it where norms have an extra state."""
    run = TinyRun(_settings(1))
    tensors = CheckpointState(Path(folder, "iter_0000002"))
    run_config = {**read_run_config(folder), "tokenizer": {}}
    write_checkpoint(Path(folder, "imported"), tensors, run_config)
    _with_extra_state()
    fresh = TinyRun(replace(_settings(1), optimizer=run.settings.optimizer))
    load_weights(f"{folder}/imported", list(fresh.chunks), [])
    return fresh.train(1)[0]


def test_an_imported_model_loads_where_norms_have_an_extra_state(tmp_path: Path) -> None:
    expected = run_single(_save, str(tmp_path), 1, False)
    # The first batch again, on the trained model: below the loss of the model that was drawn.
    drawn = run_single(_first_loss)
    imported = run_distributed(_import, 1, str(tmp_path))[0]  # in a process whose modules it may change
    assert imported < drawn - 0.05 and expected


def _first_loss() -> float:
    return TinyRun(_settings(1)).train(1)[0]
