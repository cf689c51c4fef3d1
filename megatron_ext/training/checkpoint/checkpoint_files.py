"""Reads and writes the files of a checkpoint: their layout, atomic writing, checksums, removal of old checkpoints.

Needs neither a model nor a process group. Each line below names a file ({save} is the value of --save) and its content:

    {save}/latest_checkpointed_iteration.txt      the tracker: number of the step to load
    {save}/iter_0000100/checksums.json            sha256 and size of every file below; written last
    {save}/iter_0000100/run_config.json           the whole configuration of the run
    {save}/iter_0000100/state.json                progress, schedule, families' state, the parallel layout
    {save}/iter_0000100/rng/rank_00000.pt         random number generators, one file per rank
    {save}/iter_0000100/.metadata, ...            model and optimizer, in megatron-core's format

A checkpoint is written into a hidden directory, every file is flushed to the disk, and the directory is renamed; then
the tracker is replaced by a rename. A killed save leaves only hidden files, which loading ignores and the next save
removes. The checksums detect damage (truncation, bit rot, a partial copy) before anything is unpickled. They are not a
signature: whoever can write the directory can also write a matching manifest.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.training.checkpoint import incomplete_checkpoints as kinds

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
RUN_CONFIG = "run_config.json"
BEGIN = "begin_of_documents"
"""Key in `run_config.json`. Its value lists the tokens that begin every training document (one token or none); it is
None if these tokens are unknown.
"""
STATE = "state.json"
FINAL = "final"
"""Subdirectory of `--save` with the NP weights after the last step."""

WRITING, REPLACED = ".writing.", ".replaced."
"""Prefixes of two hidden directories: of a checkpoint being written, and of one being replaced."""
_REMOVED = ".removed."
_SHOWN = 8


def check_writable(save: str) -> None:
    """Checks that files can be written to `--save`, by writing and removing one; call before training.

    Raises:
        OSError: the directory cannot be written; the message names `--save` and the reason.
    """
    folder = Path(save)
    probe = folder / f".probe.{os.getpid()}"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise OSError(f"--save {save}: not writable: {error.strerror}") from None
    with contextlib.suppress(OSError):  # another run may have begun to write to this directory
        for path in made:  # a later check may refuse the run; no directories should then be left
            path.rmdir()


def checkpoint_name(iteration: int) -> str:
    """Returns the name of a checkpoint's directory, as Megatron-LM forms it."""
    return f"iter_{iteration:07d}"


def step_of(name: str) -> int | None:
    """Returns the step in a directory's name, `iter_<step>` or `checkpoint-<step>`; None for other names."""
    match = re.fullmatch(r"(?:iter_|checkpoint-)(\d+)", name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> dict[int, Path]:
    """Returns the directories of all checkpoints in `root`, by step.

    Incomplete checkpoints and those of other programs are included.
    """
    found = {step_of(name): root / name for name in kinds.entries(root)}
    return {
        step: path for step, path in sorted(found.items(), key=lambda item: item[0] or 0) if step is not None
    }


def complete_checkpoints(root: Path) -> dict[int, Path]:
    """Returns the directories of the complete checkpoints in `root`, by step, in ascending order of steps."""
    found: dict[int, Path] = {}
    # If a replacement was interrupted, the old directory is used unless the new one was completed.
    for prefix in (REPLACED, ""):
        for name in kinds.entries(root):
            step = step_of(name.removeprefix(prefix))
            if step is not None and (root / name / CHECKSUMS).is_file():
                found[step] = root / name
    return dict(sorted(found.items()))


def checkpoints_below(root: Path) -> list[Path]:
    """Returns the directories one or two levels below `root` that contain complete checkpoints.

    A series of training runs has its checkpoints there.
    """
    folders = [path for pattern in ("*/", "*/*/") for path in root.glob(pattern) if path.is_dir()]
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):  # skip directories without read permission
            found += [folder] if complete_checkpoints(folder) else []
    return sorted(found)


def find_checkpoint(root: str, ckpt_step: int | None = None) -> Path | None:
    """Returns the checkpoint directory to load, or None if `root` is missing or contains no checkpoint.

    Args:
        root: a directory of checkpoints, or the directory of one checkpoint.
        ckpt_step: the step to load; None for the step that the tracker names, or for the newest if there is no tracker.

    Raises:
        FileNotFoundError: there is no complete checkpoint of step `ckpt_step`.
        ValueError: `root` contains something that cannot be loaded: an incomplete checkpoint, a checkpoint of another
            program, a tracker that names a missing step, a model in another format; or `root` is a file.
        OSError: the directory cannot be read.
    """
    folder = Path(root)
    if CHECKSUMS in kinds.entries(folder) and ckpt_step in (None, step_of(folder.resolve().name)):
        return folder
    found = complete_checkpoints(folder)
    if ckpt_step is not None:
        if ckpt_step not in found:
            raise FileNotFoundError(
                f"--ckpt-step {ckpt_step}: {root} contains no complete checkpoint of this step "
                f"(available: {_listed(found)})"
            )
        return found[ckpt_step]
    named, tracked = {**step_folders(folder), **found}, tracked_step(folder)
    step = max(named, default=None) if tracked is None else tracked
    if step is not None and step in found:
        return found[step]
    _refuse_unreadable(folder, named.get(step) if step is not None else folder, found, tracked)
    return None


def _refuse_unreadable(root: Path, chosen: Path | None, found: dict[int, Path], tracked: int | None) -> None:
    """Raises `ValueError` if `root` contains something that the user may want to load but that cannot be loaded."""
    others = f"; --ckpt-step selects another one (available: {_listed(found)})" if found else ""
    if chosen is None:
        raise ValueError(
            f"{root / TRACKER}: the file names step {tracked}, but there is no checkpoint of this step{others}"
        )
    reason = kinds.foreign(chosen)
    if chosen != root:
        reason = reason or f"not a complete checkpoint of this package ({CHECKSUMS} is missing)"
    elif reason is None and (below := checkpoints_below(root)):
        more = ", ..." if len(below) > _SHOWN else ""
        reason = f"no checkpoint found, but there are some in {', '.join(map(str, below[:_SHOWN]))}{more}"
    if reason is not None:
        raise ValueError(f"{chosen}: {reason}{others}")


def tracked_step(root: Path) -> int | None:
    """Returns the step that the tracker file names, or None if there is no tracker file.

    Raises:
        ValueError: the tracker does not contain a step.
        OSError: the tracker cannot be read.
    """
    try:
        text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if text.isdecimal():
        return int(text)
    found = complete_checkpoints(root)
    if text == kinds.RELEASE and not found:
        raise ValueError(f"{root}: a checkpoint of Megatron-LM; {kinds.import_command(root)}")
    others = f"; --ckpt-step selects one (available: {_listed(found)})" if found else ""
    raise ValueError(f"{root / TRACKER}: the file contains {text[:40]!r} instead of a step number{others}")


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def begin(root: Path, name: str) -> Path:
    """Removes the remains of killed saves, and creates the hidden directory for a new checkpoint."""
    root.mkdir(parents=True, exist_ok=True)
    for prefix in (WRITING, _REMOVED):
        for path in root.glob(f"{prefix}*"):
            shutil.rmtree(path)
    for path in root.glob(f"{REPLACED}*"):
        successor = root / path.name.removeprefix(REPLACED)
        if successor.exists():
            shutil.rmtree(path)
        else:
            path.rename(successor)
    folder = writing_folder(root, name)
    (folder / "rng").mkdir(parents=True)
    return folder


def writing_folder(root: Path, name: str) -> Path:
    """Returns the hidden directory to which a checkpoint is written; `publish` gives it its final name."""
    return root / f"{WRITING}{name}"


def publish(root: Path, name: str) -> None:
    """Renames the hidden directory to its final name, and writes the checkpoint's step to the tracker file."""
    target = root / name
    replaced = root / f"{REPLACED}{target.name}"
    if target.exists():
        target.rename(replaced)
    writing_folder(root, name).rename(target)
    fsync_path(root)
    replace_text(root / TRACKER, str(step_of(name)))
    if replaced.exists():
        shutil.rmtree(replaced)


def discard(root: Path, name: str) -> None:
    """Removes the files of an unfinished save."""
    shutil.rmtree(writing_folder(root, name), ignore_errors=True)
    (root / f".{TRACKER}.part").unlink(missing_ok=True)


def prune(root: Path, keep_last: int, iteration: int) -> list[str]:
    """Removes all complete checkpoints up to step `iteration` except the newest `keep_last`; returns their names."""
    complete = [path for step, path in complete_checkpoints(root).items() if step <= iteration]
    old = complete[:-keep_last]
    for path in old:
        # Rename first: if the process is killed here, no partial checkpoint keeps its name.
        shutil.rmtree(path.rename(root / f"{_REMOVED}{path.name}"))
    return [path.name for path in old]


def remove_overwritten(root: Path, name: str, kept_up_to: int | None) -> None:
    """Removes the checkpoints of an earlier run that a new run overwrites; call after the new run's first `publish`.

    Args:
        root: the directory of checkpoints.
        name: name of the new run's checkpoint.
        kept_up_to: the step from which the new run resumed; checkpoints up to it are kept. None keeps none.
    """
    doomed = [
        path
        for step, path in step_folders(root).items()
        if path.name != name and (kept_up_to is None or step > kept_up_to)
    ]
    doomed += [path for path in [root / FINAL] if path.is_dir() and kinds.holds_np_weights(path)]
    # Rename all directories first, which is quick. If the process is killed later, the remaining directories are
    # hidden, and the next save removes them.
    for path in [path.rename(root / f"{_REMOVED}{path.name}") for path in doomed]:
        shutil.rmtree(path)


def write_text(path: Path, text: str) -> None:
    """Writes a file and flushes it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replaces a file atomically; a crash of the machine leaves the old or the new text."""
    part = path.with_name(f".{path.name}.part")
    write_text(part, text)
    os.replace(part, path)
    fsync_path(path.parent)


def write_tensors(path: Path, value: Any) -> None:
    """Writes tensors and plain values in torch's format."""
    # With a path, `torch.save` would hide the system's error, such as a full disk, behind an error of torch.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    # Release the view even after an error, because Python 3.13 prints an error when it collects a buffer that still
    # has a view.
    with path.open("wb") as file, buffer.getbuffer() as content:
        file.write(content)


def write_safetensors_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors in the safetensors format; the file gets the mode of other new files (see umask).

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        # This function replaces the file by one that only the owner may read.
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # The library raises its own error, whose text contains the operating system's error.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)


def fsync_path(path: Path) -> None:
    """Flushes a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Flushes files to the disk; returns the sha256 and size of each, by file name."""
    return {name: _digest(folder / name, sync=True) for name in names}


def write_checksums(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest (the last file of a checkpoint), and flushes the checkpoint's directories to the disk."""
    write_text(folder / CHECKSUMS, json.dumps({"files": dict(sorted(files.items()))}, indent=1))
    for path in (folder / "rng", folder):
        fsync_path(path)


def verify_checkpoint(
    folder: Path, part: int = 0, parts: int = 1, names: Iterable[str] | None = None
) -> None:
    """Compares a checkpoint's files with its manifest, `checksums.json`.

    Args:
        folder: a checkpoint's directory.
        part: index of this rank among the `parts` ranks that divide the files among them.
        parts: number of these ranks.
        names: the files to compare; None for all.

    Raises:
        ValueError: a file is missing, truncated or changed; the message names it.
    """
    files = read_json(folder / CHECKSUMS).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{folder / CHECKSUMS}: damaged; the list of files is missing")
    for name in share(files if names is None else names, part, parts):
        path, expected = folder / name, files.get(name)
        if expected is None or not path.is_file():
            raise ValueError(f"{path}: the file is missing; the checkpoint is damaged")
        size = path.stat().st_size
        if size != expected["size"]:
            raise ValueError(
                f"{path}: has {size} bytes instead of {expected['size']}; the checkpoint is damaged"
            )
        if _digest(path, sync=False) != expected:
            raise ValueError(f"{path}: its content does not match {CHECKSUMS}; the checkpoint is damaged")


def share(names: Iterable[str], part: int, parts: int) -> list[str]:
    """Returns the files that one of `parts` ranks compares with the manifest.

    A rank takes the files that the rank with its number wrote when the checkpoint was saved. At the same parallel
    layout, it reads tensors from these files afterwards, which are then in the system's cache. All other files are
    divided evenly.
    """
    writers = {name: _writer(name) for name in sorted(names)}
    rest = [name for name, writer in writers.items() if writer is None or writer >= parts]
    return [name for name, writer in writers.items() if writer == part] + rest[part::parts]


def _writer(name: str) -> int | None:
    """Returns the rank that has written a file; None for a file that does not belong to a single rank."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp|rng/rank_(\d+)\.pt", name)
    return int(match[1] or match[2]) if match else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file does not contain a JSON object.
        OSError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: the file is damaged; it is not valid JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: the file is damaged; it does not contain a JSON object")
    return value


def _digest(path: Path, *, sync: bool) -> dict[str, Any]:
    sha, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            sha.update(block)
            size += len(block)
    return {"sha256": sha.hexdigest(), "size": size}
