"""Random numbers of a run that moves between kinds of devices. There is no GPU here: its file is made by hand."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.testing.checkpoint_runs import TINY_WITH_DROPOUT, RunSettings, TinyRun
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint import checkpoint_files as files

_DATA_PARALLEL = RunSettings(
    parallel=ParallelConfig(),
    checkpoint=CheckpointConfig(),
    model=replace(TINY_WITH_DROPOUT, num_layers=2),
    micro_batch_size=2,
)


def _run(**checkpoint: Any) -> TinyRun:
    return TinyRun(replace(_DATA_PARALLEL, checkpoint=CheckpointConfig(**checkpoint)))


def _save_and_go_on(folder: str) -> list[float]:
    run = _run(save=folder)
    run.train(2)
    run.save()
    return run.train(2)


def _load_and_go_on(folder: str) -> tuple[list[float], list[str]]:
    run = _run(load=folder)
    return run.train(2), run.messages


def _rewrite(folder: Path, rank: int, device: str | None, size: int | None) -> None:
    """Makes a rank's file one of another device; None leaves the kind out, or the generator's state as it is."""
    root = folder / "iter_0000002"
    path = root / "rng" / f"rank_{rank:05d}.pt"
    state = torch.load(path, weights_only=True)
    assert state.pop("device") == "cpu" and state["cuda"].numel() == 5056
    if device is not None:
        state["device"] = device
    if size is not None:
        state["cuda"] = torch.zeros(size, dtype=torch.uint8)
        state["engine"] = {name: torch.zeros(size, dtype=torch.uint8) for name in state["engine"]}
    torch.save(state, path)
    manifest = json.loads((root / files.CHECKSUMS).read_text())["files"]
    files.write_checksums(root, manifest | files.digests(root, [f"rng/{path.name}"]))


@pytest.mark.parametrize("ranks", [[0, 1], [1]])
@pytest.mark.parametrize("device", ["cuda", None])
def test_random_numbers_of_another_device_are_seeded_anew_on_every_rank(
    device: str | None, ranks: list[int], tmp_path: Path
) -> None:
    straight = run_distributed(_save_and_go_on, 2, str(tmp_path))
    for rank in ranks:
        _rewrite(tmp_path, rank, device, 16)  # bytes of a CUDA generator's state
    found = run_distributed(_load_and_go_on, 2, str(tmp_path))
    kinds = "cuda" if len(ranks) == 2 else "cpu and cuda"
    for losses, notes in found:
        assert (
            notes[0] == "random generators are re-seeded at step 2: "
            f"the checkpoint's states are for {kinds}, but the run uses cpu"
        )
        assert losses[0] == pytest.approx(straight[0][0], rel=0.05) and losses != straight[0]


def test_files_of_before_the_device_was_noted_still_give_the_run_that_never_stopped(tmp_path: Path) -> None:
    straight = run_distributed(_save_and_go_on, 2, str(tmp_path))
    for rank in (0, 1):
        _rewrite(tmp_path, rank, None, None)
    for rank, (losses, notes) in enumerate(run_distributed(_load_and_go_on, 2, str(tmp_path))):
        assert losses == straight[rank]
        assert not any("re-seeded" in note for note in notes)


def test_the_file_names_its_device(tmp_path: Path) -> None:
    run_single(_save_and_go_on, str(tmp_path))
    state = torch.load(tmp_path / "iter_0000002" / "rng" / "rank_00000.pt", weights_only=True)
    assert state["device"] == "cpu" and os.path.exists(tmp_path / files.TRACKER)
