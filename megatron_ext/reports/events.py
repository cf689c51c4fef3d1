"""Reads TensorBoard's event files as curves and sorts them by tag.

name/layer_N          one value per layer: layer N of the group `name`
curriculum/stage      index of the curriculum stage that a step belongs to
"""

import itertools
import re
from pathlib import Path

Curve = tuple[list[int], list[float]]
"""Steps in ascending order, and the value at each of them."""

STAGE_TAG = "curriculum/stage"
"""Tag of the index of the current stage."""

_LAYER_TAG = re.compile(r"(?P<name>.+)/layer_(?P<number>\d+)")
_FILES = "events.out.tfevents.*"
_FOLDERS_LEFT_OUT = {"by_samples"}
"""Folders that repeat another folder's curves over consumed samples instead of steps."""


def read_curves(
    directory: str | Path, *, flag: str = "--tensorboard-dir", required: str | None = None
) -> dict[str, Curve]:
    """Reads the event files in a directory, not in its subdirectories; returns tag -> curve.

    Args:
        directory: the TensorBoard directory of a run.
        flag: the command-line flag that gave `directory`, for error messages.
        required: a tag that the files must hold.

    Raises:
        FileNotFoundError: the directory holds no event files.
        ValueError: the files do not hold the required tag.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(Path(directory).glob(_FILES)):
        raise FileNotFoundError(f"{flag} {directory}: no TensorBoard files there")
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if required is not None and required not in scalars:
        raise ValueError(f"{flag} {directory}: the TensorBoard files hold no tag '{required}'")
    return {tag: ([e.step for e in found], [e.value for e in found]) for tag, found in scalars.items()}


def find_runs(directory: str | Path, *, flag: str = "--tensorboard-dir") -> dict[str, Path]:
    """Finds all runs below a directory; returns name -> folder, where a run in the directory itself is named "".

    Raises:
        FileNotFoundError: there are no event files below the directory.
    """
    root = Path(directory)
    folders = sorted({path.parent for path in root.glob(f"**/{_FILES}")})
    runs = {
        "" if folder == root else str(folder.relative_to(root)): folder
        for folder in folders
        if folder.name not in _FOLDERS_LEFT_OUT
    }
    if not runs:
        raise FileNotFoundError(f"{flag} {directory}: no TensorBoard files there")
    return runs


def layer_groups(curves: dict[str, Curve]) -> dict[str, dict[int, Curve]]:
    """Selects the tags `name/layer_N`; returns name -> layer -> curve, with layers in ascending order."""
    groups: dict[str, dict[int, Curve]] = {}
    for tag, curve in curves.items():
        if match := _LAYER_TAG.fullmatch(tag):
            groups.setdefault(match["name"], {})[int(match["number"])] = curve
    return {name: dict(sorted(layers.items())) for name, layers in sorted(groups.items())}


def plain_curves(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Selects the tags that are neither of a single layer nor the curriculum's stage."""
    return {
        tag: curve
        for tag, curve in sorted(curves.items())
        if tag != STAGE_TAG and not _LAYER_TAG.fullmatch(tag)
    }


def stages(curves: dict[str, Curve]) -> list[tuple[str, int, int]]:
    """Returns the (name, first, last logged step) of each curriculum stage in order; empty without a curriculum."""
    if STAGE_TAG not in curves:
        return []
    logged = zip(*curves[STAGE_TAG], strict=True)
    found = []
    for stage, group in itertools.groupby(logged, key=lambda pair: pair[1]):
        steps = [step for step, _ in group]
        found.append((f"stage {stage:g}", steps[0], steps[-1]))
    return found
