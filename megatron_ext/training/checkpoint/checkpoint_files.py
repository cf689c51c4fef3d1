"""Files of a checkpoint: layout, atomic publication, checksums, retention. Knows neither models nor process groups.

    {save}/latest_checkpointed_iteration.txt      the step to load
    {save}/iter_0000100/checksums.json            sha256 and size of every file below; written last
    {save}/iter_0000100/run_config.json           the whole configuration of the run
    {save}/iter_0000100/state.json                progress, schedule, families' state, the cut
    {save}/iter_0000100/rng/rank_00000.pt         random number generators, one file a rank
    {save}/iter_0000100/.metadata, metadata.json, common.pt, __0_0.distcp, ...      the engine's: model and optimizer

A checkpoint is written into a hidden directory beside its place, every file forced to the disk, and then renamed;
the tracker file is replaced by a rename after that. Whatever a kill leaves behind is hidden, ignored by a load and
removed when the next save starts. The checksums find damage (truncation, bit rot, a half-copied directory) before
anything is unpickled; they are no signature, and whoever can write the directory can write a matching manifest.
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
"""Key of the run's configuration: the begin-of-text token of the documents it was trained on, if any, as a list; None
where that is not known."""
STATE = "state.json"
FINAL = "final"
"""Directory beside the checkpoints with the NP weights after the last step."""

WRITING, REPLACED = ".writing.", ".replaced."
"""Beginnings of the hidden names of a directory that is being written, and of one that is being replaced."""
_REMOVED = ".removed."
_SHOWN = 8


def check_writable(save: str) -> None:
    """Creates a file in the directory and removes it, and the directories made for it; call before training.

    Raises:
        OSError: naming `--save` and the reason.
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
    with contextlib.suppress(OSError):  # another run may have begun there
        for path in made:  # the run makes them again; one that is refused after this leaves none
            path.rmdir()


def checkpoint_name(iteration: int) -> str:
    """Name of a checkpoint's directory, as Megatron-LM's."""
    return f"iter_{iteration:07d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint directory's name, Megatron-LM's or `checkpoint-<step>`; None if it is another name."""
    match = re.fullmatch(r"(?:iter_|checkpoint-)(\d+)", name)
    return int(match[1]) if match else None


def step_folders(root: Path) -> dict[int, Path]:
    """Step -> directory of every checkpoint under `root`, complete or not, this program's or another's."""
    found = {step_of(name): root / name for name in kinds.entries(root)}
    return {
        step: path for step, path in sorted(found.items(), key=lambda item: item[0] or 0) if step is not None
    }


def complete_checkpoints(root: Path) -> dict[int, Path]:
    """Step -> directory of every complete checkpoint under `root`, in ascending order."""
    found: dict[int, Path] = {}
    # A directory set aside by an interrupted replacement counts where its successor never arrived.
    for prefix in (REPLACED, ""):
        for name in kinds.entries(root):
            step = step_of(name.removeprefix(prefix))
            if step is not None and (root / name / CHECKSUMS).is_file():
                found[step] = root / name
    return dict(sorted(found.items()))


def checkpoints_below(root: Path) -> list[Path]:
    """Directories of complete checkpoints in a directory's folders and in theirs: the stacks or layers of a series."""
    folders = [path for pattern in ("*/", "*/*/") for path in root.glob(pattern) if path.is_dir()]
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):  # one that may not be read is none
            found += [folder] if complete_checkpoints(folder) else []
    return sorted(found)


def find_checkpoint(root: str, ckpt_step: int | None = None) -> Path | None:
    """The checkpoint directory to load, None where there is nothing: no directory, or one without any checkpoint.

    Args:
        root: a directory of checkpoints, or one checkpoint's own directory.
        ckpt_step: the step to load; without it the one that the tracker names, else the newest one.

    Raises:
        FileNotFoundError: `ckpt_step` is not there.
        ValueError: something is there that cannot be loaded: the checkpoint is not complete or another program's, the
            tracker names none that is there, a model in another format, a file.
        OSError: the directory cannot be read.
    """
    folder = Path(root)
    if CHECKSUMS in kinds.entries(folder) and ckpt_step in (None, step_of(folder.resolve().name)):
        return folder
    found = complete_checkpoints(folder)
    if ckpt_step is not None:
        if ckpt_step not in found:
            raise FileNotFoundError(
                f"--ckpt-step {ckpt_step}: no complete checkpoint of it in {root} (there: {_listed(found)})"
            )
        return found[ckpt_step]
    named, tracked = {**step_folders(folder), **found}, tracked_step(folder)
    step = max(named, default=None) if tracked is None else tracked
    if step is not None and step in found:
        return found[step]
    _refuse_unreadable(folder, named.get(step) if step is not None else folder, found, tracked)
    return None


def _refuse_unreadable(root: Path, chosen: Path | None, found: dict[int, Path], tracked: int | None) -> None:
    """Raises `ValueError` unless there is nothing in `root` that somebody may have meant by it."""
    others = f"; --ckpt-step takes another one (there: {_listed(found)})" if found else ""
    if chosen is None:
        raise ValueError(f"{root / TRACKER}: names step {tracked}, of which there is no checkpoint{others}")
    reason = kinds.foreign(chosen)
    if chosen != root:
        reason = reason or f"not a complete checkpoint of this program, {CHECKSUMS} is missing"
    elif reason is None and (below := checkpoints_below(root)):
        more = ", ..." if len(below) > _SHOWN else ""
        reason = f"no checkpoint there; below it are those in {', '.join(map(str, below[:_SHOWN]))}{more}"
    if reason is not None:
        raise ValueError(f"{chosen}: {reason}{others}")


def tracked_step(root: Path) -> int | None:
    """The step that the tracker names, None where there is no tracker.

    Raises:
        ValueError: it says something else.
        OSError: it cannot be read.
    """
    try:
        text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if text.isdecimal():
        return int(text)
    found = complete_checkpoints(root)
    if text == "release" and not found:
        raise ValueError(f"{root}: {kinds.OF_MEGATRON}")
    others = f"; --ckpt-step takes one (there: {_listed(found)})" if found else ""
    raise ValueError(f"{root / TRACKER}: says {text[:40]!r}, not a step{others}")


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def begin(root: Path, name: str) -> Path:
    """Removes what killed saves left behind and makes the hidden directory to write into; see `writing_folder`."""
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
    """The hidden directory in which a checkpoint is written."""
    return root / f"{WRITING}{name}"


def publish(root: Path, name: str) -> None:
    """Makes the written directory the checkpoint of its step and the one to load; from here on it counts."""
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
    """Removes what an unfinished save has written."""
    shutil.rmtree(writing_folder(root, name), ignore_errors=True)
    (root / f".{TRACKER}.part").unlink(missing_ok=True)


def prune(root: Path, keep_last: int, iteration: int) -> None:
    """Removes complete checkpoints up to step `iteration` but for the newest `keep_last`."""
    complete = [path for step, path in complete_checkpoints(root).items() if step <= iteration]
    for path in complete[:-keep_last]:
        # Renamed first, so that a kill in between leaves no half of a checkpoint under its name.
        shutil.rmtree(path.rename(root / f"{_REMOVED}{path.name}"))


def remove_overwritten(root: Path, name: str, kept_up_to: int | None) -> None:
    """Removes the checkpoints of the run whose place a new run has taken, once that has published one; see `publish`.

    Args:
        root: the directory of checkpoints.
        name: of the new run's checkpoint.
        kept_up_to: the step from which the new run goes on; checkpoints up to it are its own. None: none are.
    """
    doomed = [
        path
        for step, path in step_folders(root).items()
        if path.name != name and (kept_up_to is None or step > kept_up_to)
    ]
    doomed += [path for path in [root / FINAL] if path.is_dir() and kinds.holds_np_weights(path)]
    # All renamed first, which is quick: what a kill then leaves is hidden, and removed when the next save starts.
    for path in [path.rename(root / f"{_REMOVED}{path.name}") for path in doomed]:
        shutil.rmtree(path)


def write_text(path: Path, text: str) -> None:
    """Writes a file and forces it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replaces a file, whole or not at all, also where the machine goes down."""
    part = path.with_name(f".{path.name}.part")
    write_text(part, text)
    os.replace(part, path)
    fsync_path(path.parent)


def write_tensors(path: Path, value: Any) -> None:
    """Writes tensors and plain values in torch's format; where it fails, with the system's own error."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def fsync_path(path: Path) -> None:
    """Forces a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Forces files to the disk; name -> sha256 and size of each."""
    return {name: _digest(folder / name, sync=True) for name in names}


def write_checksums(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Writes the manifest, the last file of a checkpoint, and forces the directories to the disk."""
    write_text(folder / CHECKSUMS, json.dumps({"files": dict(sorted(files.items()))}, indent=1))
    for path in (folder / "rng", folder):
        fsync_path(path)


def verify_checkpoint(
    folder: Path, part: int = 0, parts: int = 1, names: Iterable[str] | None = None
) -> None:
    """Compares files with the manifest.

    Args:
        folder: a checkpoint's directory.
        part: of `parts` ranks that share the work.
        parts: number of ranks.
        names: only these files; without it all.

    Raises:
        ValueError: a file is missing, truncated or changed, naming it.
    """
    files = read_json(folder / CHECKSUMS).get("files")
    if not isinstance(files, dict):
        raise ValueError(f"{folder / CHECKSUMS}: damaged, it lists no files")
    for name in sorted(files if names is None else names)[part::parts]:
        path, expected = folder / name, files.get(name)
        if expected is None or not path.is_file():
            raise ValueError(f"{path}: missing; the checkpoint is damaged")
        size = path.stat().st_size
        if size != expected["size"]:
            raise ValueError(f"{path}: {size} bytes instead of {expected['size']}; the checkpoint is damaged")
        if _digest(path, sync=False) != expected:
            raise ValueError(f"{path}: its content does not match {CHECKSUMS}; the checkpoint is damaged")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: not JSON, or not an object.
        OSError: not readable.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: damaged, not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged, not a JSON object")
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
