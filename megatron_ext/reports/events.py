"""Reads TensorBoard's event files as curves and sorts them by tag.

Two kinds of tags have a special meaning:

    name/layer_N          the value `name` of layer N
    curriculum/stage      index of the curriculum stage to which a step belongs
"""

import itertools
import re
from pathlib import Path

Curve = tuple[list[int], list[float]]
"""Steps in ascending order, and the value at each of them."""

STAGE_TAG = "curriculum/stage"
"""Tag that holds the index of the current curriculum stage."""

_LAYER_TAG = re.compile(r"(?P<name>.+)/layer_(?P<number>\d+)")
EVENT_FILES = "events.out.tfevents."
"""Beginning of the names of event files; the second in which a file began follows."""

_FOLDERS_LEFT_OUT = {"by_samples"}
"""Folders that are not read, because they repeat another folder's curves over samples instead of steps."""


def read_curves(
    directory: str | Path, *, flag: str = "--tensorboard-dir", required: str | None = None
) -> dict[str, Curve]:
    """Reads the event files in a directory (not in its subdirectories); returns the curve of each tag.

    Args:
        directory: the TensorBoard directory of a run.
        flag: the command-line flag that gave `directory`, for error messages.
        required: a tag that the files must contain, or None.

    Raises:
        FileNotFoundError: the directory has no event files.
        ValueError: the files do not contain the required tag.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(Path(directory).glob(f"{EVENT_FILES}*")):
        raise FileNotFoundError(f"{flag} {directory}: no TensorBoard files there")
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if required is not None and required not in scalars:
        raise ValueError(f"{flag} {directory}: the TensorBoard files do not contain the tag '{required}'")
    return {tag: ([e.step for e in found], [e.value for e in found]) for tag, found in scalars.items()}


def find_runs(directory: str | Path, *, flag: str = "--tensorboard-dir") -> dict[str, Path]:
    """Finds all runs in and below a directory; returns each run's folder by name ("" for the directory itself).

    Raises:
        FileNotFoundError: there are no event files below the directory.
    """
    root = Path(directory)
    folders = sorted({path.parent for path in root.glob(f"**/{EVENT_FILES}*")})
    runs = {
        "" if folder == root else str(folder.relative_to(root)): folder
        for folder in folders
        if folder.name not in _FOLDERS_LEFT_OUT
    }
    if not runs:
        raise FileNotFoundError(f"{flag} {directory}: no TensorBoard files there")
    return runs


def layer_groups(curves: dict[str, Curve]) -> dict[str, dict[int, Curve]]:
    """Selects the tags `name/layer_N`; returns the curves by name and layer, with layers in ascending order."""
    groups: dict[str, dict[int, Curve]] = {}
    for tag, curve in curves.items():
        if match := _LAYER_TAG.fullmatch(tag):
            groups.setdefault(match["name"], {})[int(match["number"])] = curve
    return {name: dict(sorted(layers.items())) for name, layers in sorted(groups.items())}


def plain_curves(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Selects the curves of all tags except `name/layer_N` and `curriculum/stage`."""
    return {tag: curve for tag, curve in curves.items() if tag != STAGE_TAG and not _LAYER_TAG.fullmatch(tag)}


def stages(curves: dict[str, Curve]) -> list[tuple[str, int, int]]:
    """Returns (name, first logged step, last logged step) for each curriculum stage; empty without a curriculum."""
    if STAGE_TAG not in curves:
        return []
    logged = zip(*curves[STAGE_TAG], strict=True)
    found = []
    for stage, group in itertools.groupby(logged, key=lambda pair: pair[1]):
        steps = [step for step, _ in group]
        found.append((f"stage {stage:g}", steps[0], steps[-1]))
    return found
