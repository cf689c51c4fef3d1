"""Checks that an NPT checkpoint is complete.

The checkpoint must contain the files described in docs/design/npt_curriculum.md; a directory with only these files is
accepted too. They are loaded with `weights_only`, so that no code in them is executed. If the checkpoint has
checksums, all of its files are compared with them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_ext.npt.weights.np_weight_files import CONFIG, WEIGHTS
from megatron_ext.npt.weights.state_files import MULTI_LAYER_STATE, TRAINING_STATE
from megatron_ext.training.checkpoint import checkpoint_files as files

REQUIRED: dict[str, tuple[str, ...]] = {
    WEIGHTS: (),
    TRAINING_STATE: ("global_step", "optimizer_state_dict", "scheduler_state_dict"),
    MULTI_LAYER_STATE: ("layers_to_train", "curriculum_schedule", "current_stage_index"),
}
"""Maps the name of each required file to the keys that the file must contain."""


@dataclass
class Validation:
    """The result of a validation."""

    problems: list[str] = field(default_factory=list)
    """One line per problem; empty if the checkpoint is complete."""

    facts: list[str] = field(default_factory=list)
    """Lines that describe the checkpoint: step, NPT layers, curriculum stage and sizes."""


def choose_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """Chooses the checkpoint to validate.

    Args:
        folder: a directory that contains checkpoints, or the directory of one checkpoint.

    Returns:
        The checkpoint, and messages. The checkpoint is the newest complete one, or the newest of all if none is
        complete (a directory without checksums counts as incomplete). There is one message for each newer, incomplete
        checkpoint, and one if the file that names the latest checkpoint is wrong.

    Raises:
        FileNotFoundError: the directory neither is nor contains a checkpoint.
    """
    if any((folder / name).exists() for name in (files.CHECKSUMS, *REQUIRED)):
        return folder, []
    steps = {step: path for path in folder.iterdir() if (step := files.step_of(path.name)) is not None}
    if not steps:
        where = (
            "; the checkpoints of a sequential run are in layer_*/checkpoints"
            if any(folder.glob("layer_*"))
            else ""
        )
        raise FileNotFoundError(
            f"--checkpoint {folder}: must be a checkpoint or a directory of checkpoints{where}"
        )
    complete = files.complete_checkpoints(folder)
    newest = max(complete or steps)
    unfinished = [
        f"{steps[step]} is incomplete: it has no {files.CHECKSUMS}" for step in sorted(steps) if step > newest
    ]
    try:
        tracked = files.tracked_step(folder)
        if tracked is not None and tracked not in steps:
            unfinished.append(
                f"{folder / files.TRACKER} names step {tracked}, but there is no checkpoint of this step"
            )
    except ValueError as error:
        unfinished.append(str(error))
    return {**steps, **complete}[newest], unfinished


def validate_checkpoint(folder: Path) -> Validation:
    """Checks every file of a checkpoint; `folder` is the directory of this checkpoint itself."""
    found = Validation()
    states = {name: _load(folder / name, keys, found) for name, keys in REQUIRED.items()}
    weights, training, layers = states.values()
    if weights is not None:
        _describe_weights(weights, found)
    if training is not None:
        found.facts.append(f"step: {training['global_step']}")
    if layers is not None:
        found.facts.append(f"NPT layers: {', '.join(map(str, layers['layers_to_train']))}")
        _describe_stage(layers, found)
    if (folder / CONFIG).is_file():
        _attempt(lambda: files.read_json(folder / CONFIG), found)
    if (folder / files.CHECKSUMS).is_file():
        before = len(found.problems)
        _attempt(lambda: files.verify_checkpoint(folder), found)
        if len(found.problems) == before:
            count = len(files.read_json(folder / files.CHECKSUMS)["files"])
            found.facts.append(f"checksums: {count} files match")
    else:
        found.facts.append("checksums: none, so damage inside a file may remain unnoticed")
    return found


def _load(path: Path, keys: tuple[str, ...], found: Validation) -> dict[str, Any] | None:
    if not path.is_file():
        found.problems.append(f"missing: {path.name}")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise any type of error from a damaged file
        found.problems.append(f"cannot be loaded: {path.name} ({type(error).__name__})")
        return None
    lacking = [key for key in keys if not isinstance(state, dict) or key not in state]
    if not isinstance(state, dict) or lacking:
        found.problems.append(f"{path.name}: {', '.join(lacking) or 'named entries'} missing")
        return None
    return state


def _describe_weights(weights: dict[str, Any], found: Validation) -> None:
    others = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others:
        found.problems.append(f"{WEIGHTS}: {others[0]} is not a tensor")
        return
    broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if broken:
        found.problems.append(f"{WEIGHTS}: {broken[0]} is not finite ({len(broken)} tensors in all)")
    count = sum(value.numel() for value in weights.values())
    found.facts.append(f"NP weights: {len(weights)} tensors, {count:,} numbers")


def _describe_stage(state: dict[str, Any], found: Validation) -> None:
    schedule, index = state["curriculum_schedule"], state["current_stage_index"]
    if not schedule:
        return
    if not isinstance(index, int) or not 0 <= index < len(schedule):
        found.problems.append(
            f"{MULTI_LAYER_STATE}: current_stage_index {index} is out of range for {len(schedule)} stages"
        )
        return
    stage = schedule[index]
    name = stage["name"] if isinstance(stage, dict) and "name" in stage else stage
    found.facts.append(f"stage: {name} ({index + 1} of {len(schedule)})")


def _attempt(action: Any, found: Validation) -> None:
    try:
        action()
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
