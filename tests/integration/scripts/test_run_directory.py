"""What lies in a directory is loaded, or refused with what to do; what a run would write over is never lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.config.command_line.parse import parse
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.run_config import RunConfig
from megatron_ext.npt import NPTModel
from megatron_ext.npt.weights.checkpoint_validation import choose_checkpoint
from megatron_ext.platform import process_groups
from megatron_ext.testing.checkpoint_runs import RunSettings, TinyRun
from megatron_ext.testing.run_single import run_single
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint.base_checkpoint import BaseCheckpoint
from megatron_ext.training.checkpoint.checkpointer import read_run_config
from megatron_ext.training.checkpoint.run_directory import check_directories
from megatron_ext.training.pretrain import check_run, process_group, resolve, train
from tests.integration.npt.npt_run_helpers import MODEL, write_data
from tests.integration.scripts.kill_helpers import snapshots

_ALONE = RunSettings(parallel=ParallelConfig(), checkpoint=CheckpointConfig())


def _run(**checkpoint: Any) -> TinyRun:
    return TinyRun(replace(_ALONE, checkpoint=CheckpointConfig(**checkpoint)))


def _save_steps(folder: str, *steps: int) -> None:
    run = _run(save=folder)
    for step in steps:
        run.train(step - run.progress.iteration)
        run.save()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    run_single(_save_steps, str(folder), 1, 2)
    return folder


def _megatron(folder: Path, name: str = "iter_0000020") -> Path:
    """Names as Megatron-LM 0.16 gives them in its torch_dist format."""
    (folder / name).mkdir(parents=True)
    for part in (".metadata", "metadata.json", "common.pt", "__0_0.distcp"):
        (folder / name / part).write_bytes(b"not ours")
    return folder / name


def _megatron_itself(folder: Path) -> Path:
    return _megatron(folder)


def _megatron_with_tracker(folder: Path) -> Path:
    _megatron(folder)
    (folder / files.TRACKER).write_text("20")
    return folder


def _megatron_without_tracker(folder: Path) -> Path:
    _megatron(folder)
    (folder / files.TRACKER).unlink()
    return folder


def _megatron_legacy(folder: Path) -> Path:
    (folder / "iter_0000020" / "mp_rank_00").mkdir(parents=True)
    (folder / files.TRACKER).write_text("20")
    return folder


def _release(folder: Path) -> Path:
    _megatron(folder, "release")
    (folder / files.TRACKER).write_text("release\n")
    return folder


def _ours_without_checksums(folder: Path) -> Path:
    (folder / "iter_0000002" / files.CHECKSUMS).unlink()
    return folder / "iter_0000002"


def _newest_without_checksums(folder: Path) -> Path:
    _ours_without_checksums(folder)
    return folder


def _copied_in_part(folder: Path) -> Path:
    _ours_without_checksums(folder)
    (folder / files.TRACKER).unlink()
    return folder


def _rubbish_in_tracker(folder: Path) -> Path:
    (folder / files.TRACKER).write_text("step two")
    return folder


def _empty_tracker(folder: Path) -> Path:
    (folder / files.TRACKER).write_text("")
    return folder


def _tracked_step_gone(folder: Path) -> Path:
    (folder / files.TRACKER).write_text("60")
    return folder


def _file(folder: Path) -> Path:
    (folder / "checkpoint").write_text("")
    return folder / "checkpoint"


def _hugging_face(folder: Path) -> Path:
    for part in folder.iterdir():
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def _one_above(folder: Path) -> Path:
    return folder.parent


def _np_weights(folder: Path) -> Path:
    (folder / "final").mkdir()
    (folder / "final" / "npt_weights.pt").write_bytes(b"")
    return folder / "final"


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a checkpoint of Megatron-LM": (_megatron_itself, "iter_0000020: a checkpoint of Megatron-LM"),
    "Megatron-LM's directory": (_megatron_with_tracker, "iter_0000020: a checkpoint of Megatron-LM"),
    "Megatron-LM's directory without tracker": (_megatron_without_tracker, "a checkpoint of Megatron-LM"),
    "Megatron-LM's older format": (_megatron_legacy, "a checkpoint of Megatron-LM"),
    "a tracker that says release": (
        _release,
        "contains 'release' instead of a step number; --ckpt-step selects one (available: 1, 2)",
    ),
    "ours without checksums": (_ours_without_checksums, "not a complete checkpoint of this package"),
    "the newest without checksums": (_newest_without_checksums, "selects another one (available: 1)"),
    "a directory copied in part": (_copied_in_part, "iter_0000002: not a complete checkpoint"),
    "a tracker with rubbish": (
        _rubbish_in_tracker,
        "contains 'step two' instead of a step number; --ckpt-step selects one (available: 1, 2)",
    ),
    "an empty tracker": (_empty_tracker, "contains '' instead of a step number"),
    "a tracked step that is gone": (
        _tracked_step_gone,
        "names step 60, but there is no checkpoint of this step",
    ),
    "a file": (_file, "checkpoint: this is a file, not a directory"),
    "a Hugging Face model": (_hugging_face, "tools/convert_checkpoint.py import"),
    "the directory above": (_one_above, "but there are some in"),
    "NP weights": (_np_weights, "--load-npt-weights"),
}
READERS: dict[str, Callable[[str], Any]] = {
    "a run": lambda path: check_directories(CheckpointConfig(load=path), writes=True),
    "a run that goes on": lambda path: check_directories(CheckpointConfig(load=path, save=path), writes=True),
    "evaluate, generate, export": read_run_config,
    "the base of an NPT run": BaseCheckpoint.find,
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_an_error_in_every_reader_and_no_new_run(
    case: str, saved: Path, tmp_path: Path
) -> None:
    make, told = UNREADABLE[case]
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    path = str(make(folder))
    for reader, read in READERS.items():
        with pytest.raises((ValueError, OSError)) as caught:
            read(path)
        assert told in str(caught.value) and "\n" not in str(caught.value), reader


@pytest.mark.parametrize(
    "case", [name for name in UNREADABLE if name not in ("a Hugging Face model", "NP weights")]
)
def test_from_python_it_is_an_error_too(case: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    with pytest.raises((ValueError, OSError)):
        NPTModel.from_pretrained(UNREADABLE[case][0](folder))


def test_nothing_there_is_a_new_run_also_beside_the_logs_of_its_own_directory(tmp_path: Path) -> None:
    missing, empty = str(tmp_path / "missing"), tmp_path / "empty"
    empty.mkdir()
    (empty / ".run_lock").write_text("of a killed run")
    assert files.find_checkpoint(missing) is files.find_checkpoint(str(empty)) is None
    for folder in (missing, str(empty)):
        check_directories(CheckpointConfig(load=folder, save=folder), writes=True)
    (empty / "tensorboard").mkdir()
    check_directories(CheckpointConfig(load=str(empty), save=str(empty)), writes=True)
    with pytest.raises(ValueError, match="--load .*empty: contains no checkpoint, only tensorboard"):
        check_directories(CheckpointConfig(load=str(empty), save=missing), writes=True)


NO_ACCESS = """
import sys
from megatron_ext.training.checkpoint.checkpoint_files import find_checkpoint
try:
    print(find_checkpoint(sys.argv[1]))
except OSError as error:
    print(error)
"""


def test_a_directory_that_may_not_be_read_is_an_error(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    folder.chmod(0)
    try:
        command = [*_as_a_user(), sys.executable, "-c", NO_ACCESS, str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        folder.chmod(0o700)
    assert result.stdout == f"{folder}: cannot be read: Permission denied\n"


def _as_a_user() -> list[str]:
    """Prefix of a command without root's right to pass over permissions."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root reads everything here")
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]


def test_validation_tells_of_a_tracker_that_names_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    assert choose_checkpoint(folder) == (folder / "iter_0000002", [])
    for text in ("60", "rubbish"):
        (folder / files.TRACKER).write_text(text)
        assert text in choose_checkpoint(folder)[1][0]


def _message(**checkpoint: Any) -> str:
    try:
        check_directories(CheckpointConfig(**checkpoint), writes=True)
    except ValueError as error:
        return str(error)
    return ""


def test_a_run_writes_only_where_it_loses_nothing(saved: Path, tmp_path: Path) -> None:
    here, other = str(saved), tmp_path / "other"
    shutil.copytree(saved, other)
    assert f"--save {here}: contains another run (steps 1, 2)" in _message(save=here)
    assert f"pass --load {other};" in _message(load=here, save=str(other))
    assert "without --finetune" in _message(load=here, save=here, finetune=True)
    assert "steps 2, which are later than the loaded step 1" in _message(load=here, save=here, ckpt_step=1)
    assert "steps 2, which are later than the loaded step 1" in _message(
        load=f"{here}/iter_0000001", save=here
    )
    assert "is itself a checkpoint" in _message(save=f"{here}/iter_0000002")
    for allowed in (
        {"load": here, "save": here},
        {"load": f"{here}/iter_0000002", "save": here},
        {"load": here, "save": here, "ckpt_step": 2},
        {"load": here, "save": str(tmp_path / "new")},
        {"save": str(tmp_path / "new")},
        {"save": here, "overwrite_checkpoints": True},
        {"load": here, "save": here, "ckpt_step": 1, "overwrite_checkpoints": True},
    ):
        assert _message(**allowed) == ""
    check_directories(CheckpointConfig(save=here), writes=False)  # --skip-train
    new = str(tmp_path / "new")
    with pytest.raises(ValueError, match="no checkpoint found, and --skip-train needs one to evaluate"):
        check_directories(CheckpointConfig(load=new, save=new), writes=False)


def test_a_load_without_a_checkpoint_is_a_start_from_scratch_only_where_the_run_saves(tmp_path: Path) -> None:
    new, misspelt = str(tmp_path / "new"), str(tmp_path / "misspelt")
    assert _message(load=new, save=new) == ""
    for save in ({"save": new}, {}):
        assert _message(load=misspelt, **save).startswith(
            f"--load {misspelt}: no checkpoint found; omit --load"
        )


@pytest.mark.parametrize("name", ["progressive.json", "training_info.json"])
def test_a_run_does_not_write_into_the_directory_of_a_series(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    assert f"contains a series of training runs ({name})" in _message(save=str(tmp_path))


def _remains_of_a_kill(folder: str) -> str:
    """A run that a kill left between a checkpoint and the tracker: step 2 is there, and step 1 is tracked."""
    _save_steps(folder, 1, 2)
    (Path(folder) / files.TRACKER).write_text("1")
    check_directories(CheckpointConfig(load=folder, save=folder), writes=True)
    run = _run(load=folder, save=folder)
    run.train(1)
    run.save()
    return " ".join(run.messages) + (Path(folder) / files.TRACKER).read_text()


def test_a_run_goes_on_over_what_its_own_killed_save_has_left(tmp_path: Path) -> None:
    assert "--save also contains later checkpoints of steps 2" in run_single(
        _remains_of_a_kill, str(tmp_path)
    )


def _meets_a_run_that_came_and_went(folder: str, data: str) -> str:
    process_groups.shutdown = lambda: None  # the tests' processes join one process group only
    flags = [*MODEL, "--lr", "1e-2", "--train-iters", "1", "--data-path", data, "--save", f"{folder}/run"]
    config = parse(RunConfig, flags)
    tokenizer = check_run(resolve(config), lambda _: check_directories(config.checkpoint, writes=True))
    other = files.begin(Path(folder, "run"), "iter_0000003")
    files.write_checksums(other, {})
    files.publish(Path(folder, "run"), "iter_0000003")
    group = process_group(config.parallel, config.training, config.checkpoint)
    with group, pytest.raises(ValueError) as caught:  # noqa: PT011
        train(config, tokenizer, [])
    return str(caught.value)


def test_a_run_that_came_and_went_since_the_start_is_not_written_over(tmp_path: Path) -> None:
    told = run_single(_meets_a_run_that_came_and_went, str(tmp_path), write_data(tmp_path))
    assert told.startswith(f"--save {tmp_path}/run: contains another run (steps 3)")


def _checksum(run: TinyRun) -> float:
    return float(sum(p.detach().double().abs().sum() for chunk in run.chunks for p in chunk.parameters()))


def _overwrite(folder: str, load_step: int | None) -> tuple[list[str], dict[int, float]]:
    """The first save of a run that overwrites another one of steps 1, 2, 3; or goes on from one of its steps."""
    place = f"{folder}/place"
    old = _run(save=place)
    for _ in range(3):
        old.train(1)
        old.save()
    final = Path(place, "final")
    final.mkdir()
    (final / "npt_weights.pt").write_bytes(b"of the old run")
    load = {} if load_step is None else {"load": place, "ckpt_step": load_step}
    new = _run(save=place, overwrite_checkpoints=True, **load)
    new._batches = iter([next(new._batches)] * 8)  # other data than the old run's
    new.train(1)
    expected = {3: _checksum(old), new.progress.iteration: _checksum(new)}
    return snapshots(place, folder, new.save), expected


def _load_and_go_on(folders: list[str]) -> list[tuple[int, float, list[int]]]:
    found = []
    for folder in folders:
        run = _run(load=folder, save=folder)
        steps = list(files.complete_checkpoints(Path(folder)))
        found.append((run.progress.iteration, _checksum(run), steps))
    return found


@pytest.mark.parametrize("load_step", [None, 1])
def test_a_kill_at_any_moment_of_overwriting_leaves_the_old_run_whole_or_the_new_one_to_load(
    load_step: int | None, tmp_path: Path
) -> None:
    folders, expected = run_single(_overwrite, str(tmp_path), load_step)
    results = run_single(_load_and_go_on, folders)
    new = (load_step or 0) + 1
    for step, checksum, there in results:
        assert checksum == expected[step]
        assert step == new or {1, 2, 3} <= set(there)
    assert [step for step, _, _ in results] == sorted((step for step, _, _ in results), reverse=True)
    assert results[0][0] == 3
    # At the end nothing is left of what the new run has not written or gone on from.
    assert results[-1][2] == ([1] if load_step is None else [1, 2])
    assert not [name for name in os.listdir(folders[-1]) if name.startswith(".") or name == "final"]
