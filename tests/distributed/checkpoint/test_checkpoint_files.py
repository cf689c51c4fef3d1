"""What is on the disk: complete or not there, whatever kills the save; damage is found before it is read.

Each of it holds for a save that training waits for, and for one beside training (`--async-save`).
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.tiny_training import TINY
from megatron_ext.training.checkpoint import checkpoint_files as files
from tests.integration.scripts.kill_helpers import snapshots

_TP2 = ParallelConfig(tensor_model_parallel_size=2)
_SINGLE = RunSettings(
    parallel=ParallelConfig(),
    checkpoint=CheckpointConfig(),
    model=replace(TINY, num_layers=2),
    micro_batch_size=2,
)

BOTH_WAYS = pytest.mark.parametrize("beside", [False, True], ids=["waited for", "beside training"])


def _run(**checkpoint: Any) -> TinyRun:
    return TinyRun(replace(_SINGLE, checkpoint=CheckpointConfig(**checkpoint)))


def _names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def _save(run: TinyRun, beside: bool) -> None:
    """Saves a run; `beside`: while it trains one more step, which the checkpoint does not hold."""
    if not beside:
        run.save()
        return
    run.checkpointer.begin_save(replace(run.progress))
    run.train(1)
    run.checkpointer.proceed_with_save(wait=True)


def _states_during_a_save(folder: str, beside: bool) -> tuple[list[str], dict[int, float]]:
    """Copies the directory before each change that a save makes to it: that is what a kill at that moment leaves.

    The save is the hardest one: it replaces a checkpoint of the same step, and removes an older one.
    """
    place = f"{folder}/place"
    first = _run(save=place)
    first.train(1)
    first.save()
    expected = {1: _checksum(first)}
    first.train(1)
    first.save()
    (Path(place) / files.TRACKER).write_text("1")
    second = _run(load=place, save=place, keep_last=1)
    second.train(1)
    expected[2] = _checksum(second)
    return snapshots(place, folder, lambda: _save(second, beside)), expected


def _checksum(run: TinyRun) -> float:
    return float(sum(p.detach().double().abs().sum() for chunk in run.chunks for p in chunk.parameters()))


def _load_and_save_again(folders: list[str]) -> list[tuple[int, float, list[str]]]:
    found = []
    for folder in folders:
        run = _run(load=folder, save=folder)
        found.append((run.progress.iteration, _checksum(run)))
        run.save()
    return [(*result, _names(folder)) for result, folder in zip(found, folders, strict=True)]


@BOTH_WAYS
def test_a_kill_at_any_moment_of_a_save_leaves_a_complete_checkpoint_loadable(
    beside: bool, tmp_path: Path
) -> None:
    folders, expected = run_single(_states_during_a_save, str(tmp_path), beside)
    assert len(folders) > 20
    results = run_single(_load_and_save_again, folders)
    for iteration, checksum, names in results:
        assert checksum == expected[iteration]
        # The next save has removed what the kill left.
        assert not [name for name in names if name.startswith(".")]
    steps = [iteration for iteration, _, _ in results]
    assert steps == sorted(steps) and set(steps) == {1, 2}


def _save_for_ever(folder: str, beside: bool) -> None:
    run = _run(save=folder)
    run.train(1)
    while True:
        _save(run, beside)
        run.progress.iteration += not beside


def _load_progress(folder: str, model: ModelConfig = _SINGLE.model) -> int:
    settings = replace(_SINGLE, checkpoint=CheckpointConfig(load=folder), model=model)
    return TinyRun(settings).progress.iteration


@BOTH_WAYS
def test_a_run_killed_while_saving_goes_on_from_the_newest_checkpoint(beside: bool, tmp_path: Path) -> None:
    for milliseconds in (10, 60, 110):
        folder = tmp_path / str(milliseconds)
        process = multiprocessing.get_context("forkserver").Process(
            target=_save_for_ever, args=(str(folder), beside)
        )
        process.start()
        try:
            deadline = time.monotonic() + 120
            while not (folder / "iter_0000002").exists() and process.is_alive():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(milliseconds / 1000)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        newest = max(files.complete_checkpoints(folder))
        assert run_single(_load_progress, str(folder)) in (newest, newest - 1)


def _save_once(folder: str) -> None:
    run = _run(save=folder)
    run.train(1)
    run.save()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_single(_save_once, str(folder))
    return folder


def _loading_errors(folders: list[str]) -> list[str]:
    errors = []
    for folder in folders:
        with pytest.raises((ValueError, OSError)) as caught:
            _run(load=folder)
        errors.append(str(caught.value))
    return errors


def _truncate(folder: Path, name: str) -> None:
    path = folder / "iter_0000001" / name
    path.write_bytes(path.read_bytes()[:-7])


def _flip_a_bit(folder: Path, name: str) -> None:
    path = folder / "iter_0000001" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _remove(folder: Path, name: str) -> None:
    (folder / "iter_0000001" / name).unlink()


def test_a_damaged_file_is_refused_in_one_line_that_names_it(saved: Path, tmp_path: Path) -> None:
    damages = [
        (damage, name)
        for damage in (_truncate, _flip_a_bit, _remove)
        for name in ("__0_0.distcp", ".metadata", "state.json", "rng/rank_00000.pt")
    ]
    damages += [(_truncate, files.CHECKSUMS), (_remove, files.CHECKSUMS)]
    folders: list[Path] = []
    for index, (damage, name) in enumerate(damages):
        folders.append(tmp_path / str(index))
        shutil.copytree(saved, folders[-1])
        damage(folders[-1], name)
    errors = run_single(_loading_errors, [str(folder) for folder in folders])
    for folder, (_, name), error in zip(folders, damages, errors, strict=True):
        assert str(folder / "iter_0000001") in error and Path(name).name in error
        assert "\n" not in error


def _save_without_space(
    folder: str, limit: int | None, limited_rank: int, beside: bool
) -> tuple[str, list[str]]:
    import resource

    world_size = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig(tensor_model_parallel_size=world_size)
    run = TinyRun(replace(_SINGLE, parallel=parallel, checkpoint=CheckpointConfig(save=folder), model=TINY))
    run.train(1)
    run.save()
    run.train(1)
    if limit is not None and int(os.environ["RANK"]) == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(OSError) as caught:  # noqa: PT011
        _save(run, beside)
    return str(caught.value), _names(folder)


@BOTH_WAYS
@pytest.mark.parametrize("limited_rank", [0, 1])
@pytest.mark.parametrize("limit", [100, 100_000])
def test_a_rank_that_cannot_write_fails_the_save_on_every_rank_and_leaves_nothing(
    limited_rank: int, limit: int, beside: bool, tmp_path: Path
) -> None:
    for error, names in run_distributed(
        _save_without_space, 2, str(tmp_path), limit, limited_rank, beside, timeout=60
    ):
        assert error.startswith(f"--save {tmp_path}: the checkpoint of step 2 could not be written (")
        assert "\n" not in error
        assert names == ["iter_0000001", files.TRACKER]
    assert run_single(_load_progress, str(tmp_path), TINY) == 1


@BOTH_WAYS
@pytest.mark.parametrize("small_disk", ["1000k"], indirect=True)
def test_a_full_disk_fails_the_save_and_leaves_nothing(beside: bool, small_disk: Path) -> None:
    error, names = run_distributed(_save_without_space, 1, str(small_disk), None, 0, beside, timeout=60)[0]
    assert "No space left on device" in error
    assert names == ["iter_0000001", files.TRACKER]


def test_a_directory_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--save .*/file/checkpoints: not writable: Not a directory"):
        files.check_writable(str(tmp_path / "file" / "checkpoints"))
    files.check_writable(str(tmp_path / "new" / "checkpoints"))
    assert not (tmp_path / "new").exists()  # a run that is refused after this leaves none
    (tmp_path / "there").mkdir()
    files.check_writable(str(tmp_path / "there"))
    assert _names(tmp_path / "there") == []


def _make_complete(root: Path, *steps: int) -> None:
    for step in steps:
        folder = files.begin(root, files.checkpoint_name(step))
        files.write_checksums(folder, {})
        files.publish(root, files.checkpoint_name(step))


def test_the_newest_checkpoints_are_kept_and_later_ones_of_another_run_untouched(tmp_path: Path) -> None:
    _make_complete(tmp_path, 9, 1, 2, 3, 4)
    removed = files.prune(tmp_path, keep_last=2, iteration=4)
    assert removed == ["iter_0000001", "iter_0000002"]
    assert list(files.complete_checkpoints(tmp_path)) == [3, 4, 9]
    assert (tmp_path / files.TRACKER).read_text() == "4"


def test_the_tracker_names_the_checkpoint_to_load(tmp_path: Path) -> None:
    assert files.find_checkpoint(str(tmp_path)) is None
    assert files.find_checkpoint(str(tmp_path / "missing")) is None
    _make_complete(tmp_path, 1, 2)
    (tmp_path / files.TRACKER).write_text("1")
    assert files.find_checkpoint(str(tmp_path)) == tmp_path / "iter_0000001"
    assert files.find_checkpoint(str(tmp_path), 2) == tmp_path / "iter_0000002"
    assert files.find_checkpoint(str(tmp_path / "iter_0000002")) == tmp_path / "iter_0000002"
    assert files.find_checkpoint(str(tmp_path / "iter_0000002"), 2) == tmp_path / "iter_0000002"
    (tmp_path / files.TRACKER).unlink()
    assert files.find_checkpoint(str(tmp_path)) == tmp_path / "iter_0000002"
    with pytest.raises(FileNotFoundError, match=r"--ckpt-step 5: .*available: 1, 2"):
        files.find_checkpoint(str(tmp_path), 5)


def test_a_checkpoint_that_is_not_complete_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "iter_0000003").mkdir()
    (tmp_path / files.TRACKER).write_text("3")
    with pytest.raises(ValueError, match="iter_0000003: not a complete checkpoint"):
        files.find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_file_is_checked_by_one_rank_and_a_ranks_own_files_by_itself(ranks: int) -> None:
    written = [f"__{rank}_0.distcp" for rank in range(4)] + [f"rng/rank_0000{rank}.pt" for rank in range(4)]
    names = [*written, ".metadata", "common.pt", files.RUN_CONFIG, files.STATE]
    shares = [files.share(names, rank, ranks) for rank in range(ranks)]
    assert sorted(name for part in shares for name in part) == sorted(names)
    for rank in range(min(ranks, 4)):
        assert {f"__{rank}_0.distcp", f"rng/rank_0000{rank}.pt"} <= set(shares[rank])


def _save_at_tp2(folder: str) -> None:
    run = TinyRun(replace(_SINGLE, parallel=_TP2, checkpoint=CheckpointConfig(save=folder)))
    run.train(1)
    run.save()


def _opened_in_a_load(folder: str) -> Counter[str]:
    run = TinyRun(replace(_SINGLE, parallel=_TP2))
    run.checkpointer.config = CheckpointConfig(load=folder)
    opened: Counter[str] = Counter()

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(folder):
            opened[Path(str(arguments[0])).name] += 1

    sys.addaudithook(count)
    run.checkpointer.load()
    return opened


def test_a_load_reads_a_ranks_file_once_for_its_checksum_and_once_for_model_and_optimizer_each(
    tmp_path: Path,
) -> None:
    run_distributed(_save_at_tp2, 2, str(tmp_path))
    for rank, opened in enumerate(run_distributed(_opened_in_a_load, 2, str(tmp_path))):
        assert opened[f"__{rank}_0.distcp"] == 3
        # The engine parses the metadata in both loads, and we once; one rank checks it.
        assert opened[".metadata"] == 3 + (rank == 0)


def test_checksums_are_those_of_the_system_tool(saved: Path) -> None:
    folder = saved / "iter_0000001"
    manifest = json.loads((folder / files.CHECKSUMS).read_text())["files"]
    everything = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(manifest) == everything - {files.CHECKSUMS}
    for name, entry in manifest.items():
        line = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True)
        assert line.stdout.split()[0] == entry["sha256"]
        assert (folder / name).stat().st_size == entry["size"]
