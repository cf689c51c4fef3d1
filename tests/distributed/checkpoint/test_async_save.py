"""A save beside training: it holds what one in its place holds, waits for nobody, and fails as that one does."""

import io
import json
import os
import shutil
import subprocess
import threading
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
from megatron_ext.training.checkpoint.saving.hashed_file import HashedFile, WritingCancelled

LAYOUTS = {
    "one process": (1, ParallelConfig(), False),
    "bf16": (1, ParallelConfig(), True),
    "TP2": (2, ParallelConfig(tensor_model_parallel_size=2), False),
    "PP2": (2, ParallelConfig(pipeline_model_parallel_size=2), False),
    "DP2, distributed optimizer": (2, ParallelConfig(use_distributed_optimizer=True), False),
    "DP2, distributed optimizer, bf16": (2, ParallelConfig(use_distributed_optimizer=True), True),
}


def _run(parallel: ParallelConfig | None = None, bf16: bool = False, **checkpoint: Any) -> TinyRun:
    settings = RunSettings(
        parallel=parallel or ParallelConfig(),
        checkpoint=CheckpointConfig(**checkpoint),
        precision="bf16" if bf16 else "fp32",
        micro_batch_size=2,
    )
    return TinyRun(replace(settings, model=replace(TINY_WITH_DROPOUT, num_layers=2)))


def _names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def _save_both_ways(folder: str, parallel: ParallelConfig, bf16: bool) -> tuple[list[float], int]:
    """Saves step 2 in its place, then beside steps 3 and 4; returns their losses and the number of threads left."""
    run = _run(parallel, bf16, save=f"{folder}/sync")
    run.train(1)
    run.checkpointer.save(run.progress)
    run.train(1)
    run.checkpointer.save(run.progress)
    run.checkpointer.config = CheckpointConfig(save=f"{folder}/async")
    threads = threading.active_count()
    for _ in range(2):  # the second one writes over the first one's copies
        run.checkpointer.begin_save(run.progress)
        complete = run.checkpointer.proceed_with_save(wait=True)
    assert complete
    run.checkpointer.begin_save(run.progress)
    losses = run.train(2)
    assert run.checkpointer.proceed_with_save(wait=True)
    return losses, threading.active_count() - threads


def _go_on(folder: str, parallel: ParallelConfig, bf16: bool) -> list[float]:
    return _run(parallel, bf16, load=folder).train(2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_save_beside_training_writes_the_bytes_of_one_in_its_place_whatever_training_does_meanwhile(
    layout: str, tmp_path: Path
) -> None:
    world_size, *how = LAYOUTS[layout]
    losses, threads = run_distributed(_save_both_ways, world_size, str(tmp_path), *how)[0]
    assert threads == 0
    ours, theirs = (
        json.loads((tmp_path / name / "iter_0000002" / files.CHECKSUMS).read_text())["files"]
        for name in ("async", "sync")
    )
    assert _names(tmp_path / "async") == ["iter_0000002", files.TRACKER]
    assert ours.keys() == theirs.keys()
    # `.metadata` holds the directory's name and an identity of the save.
    assert [name for name in ours if ours[name] != theirs[name]] == [".metadata"]
    for name, entry in ours.items():
        line = subprocess.run(
            ["sha256sum", tmp_path / "async" / "iter_0000002" / name],
            capture_output=True,
            text=True,
            check=True,
        )
        assert line.stdout.split()[0] == entry["sha256"]
    assert run_distributed(_go_on, world_size, str(tmp_path / "async"), *how)[0] == losses


def _begin_twice(folder: str) -> list[str]:
    run = _run(save=folder)
    run.train(1)
    run.checkpointer.begin_save(run.progress)
    for save in (run.checkpointer.begin_save, run.checkpointer.save):
        with pytest.raises(AssertionError, match="a save is still running"):
            save(run.progress)
    run.checkpointer.proceed_with_save(wait=True)
    assert not run.checkpointer.proceed_with_save(wait=True)
    return _names(folder)


def test_a_save_is_not_begun_before_the_last_one_is_complete(tmp_path: Path) -> None:
    assert run_single(_begin_twice, str(tmp_path)) == ["iter_0000001", files.TRACKER]


def _give_up(folder: str) -> tuple[list[str], int]:
    run = _run(save=folder)
    run.train(1)
    run.checkpointer.save(run.progress)
    run.train(1)
    threads = threading.active_count()
    run.checkpointer.begin_save(run.progress)
    run.checkpointer.give_up_save()
    assert not run.checkpointer.proceed_with_save(wait=True)
    return _names(folder), threading.active_count() - threads


def test_a_save_that_is_given_up_leaves_no_thread_and_only_what_a_kill_would(tmp_path: Path) -> None:
    names, threads = run_single(_give_up, str(tmp_path))
    assert threads == 0
    assert names == [f"{files.WRITING}iter_0000002", "iter_0000001", files.TRACKER]
    assert files.find_checkpoint(str(tmp_path)) == tmp_path / "iter_0000001"


def _keep_one(folder: str) -> list[str]:
    run = _run(save=folder, keep_last=1)
    for _ in range(3):
        run.train(1)
        run.checkpointer.begin_save(run.progress)
        run.checkpointer.proceed_with_save(wait=True)
    return _names(folder)


def test_older_checkpoints_are_removed_after_a_save_beside_training(tmp_path: Path) -> None:
    assert run_single(_keep_one, str(tmp_path)) == ["iter_0000003", files.TRACKER]


def test_a_hashed_file_holds_and_hashes_what_is_written_and_stops_when_it_is_not_wanted(
    tmp_path: Path,
) -> None:
    cancelled = threading.Event()
    content = [b"", b"head", os.urandom(3 * 2**20 + 7), torch.arange(5).numpy().tobytes()]
    with HashedFile(tmp_path / "file", cancelled) as file:
        for part in content:
            assert file.write(memoryview(part)) == len(part)
        cancelled.set()
        with pytest.raises(WritingCancelled):
            file.write(b"more")
    assert (tmp_path / "file").read_bytes() == b"".join(content)
    assert {"file": file.digest()} == files.digests(tmp_path, ["file"])
    file.flush()  # as torch's wrapper of the file does after it is closed; it is no error
    assert isinstance(file, io.RawIOBase), "a buffer would be written by forked processes too"
    shutil.rmtree(tmp_path)
