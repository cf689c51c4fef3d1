"""Reads TensorBoard's event files as plain curves, and sorts them: losses, per-layer values, stages of a curriculum.

name/layer_N          one value a layer: the group `name`, layer N
curriculum/stage      the number of the stage that a step belongs to
"""

import itertools
import re
from pathlib import Path

Curve = tuple[list[int], list[float]]
"""Steps, ascending, and values."""

STAGE_TAG = "curriculum/stage"
"""Tag of the number of the present stage."""

_LAYER_TAG = re.compile(r"(?P<name>.+)/layer_(?P<number>\d+)")
_FILES = "events.out.tfevents.*"
_FOLDERS_LEFT_OUT = {"by_samples"}
"""Folders whose curves are another folder's over consumed samples."""


def read_curves(
    directory: str | Path, *, flag: str = "--tensorboard-dir", required: str | None = None
) -> dict[str, Curve]:
    """Tag -> curve, of the event files in a directory; not of its folders.

    Args:
        directory: what training wrote to.
        flag: named in messages, as what gave the directory.
        required: a tag that must be there.

    Raises:
        FileNotFoundError: no event files there.
        ValueError: the required tag is not in them.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(Path(directory).glob(_FILES)):
        raise FileNotFoundError(f"{flag} {directory}: no TensorBoard files there")
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    if required is not None and required not in scalars:
        raise ValueError(f"{flag} {directory}: its files hold no '{required}'")
    return {tag: ([e.step for e in found], [e.value for e in found]) for tag, found in scalars.items()}


def find_runs(directory: str | Path, *, flag: str = "--tensorboard-dir") -> dict[str, Path]:
    """Name -> folder of every run below a directory; a run in the directory itself has the name "".

    Raises:
        FileNotFoundError: no event files there.
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
    """The curves of tags `name/layer_N`: name -> layer -> curve, layers ascending."""
    groups: dict[str, dict[int, Curve]] = {}
    for tag, curve in curves.items():
        if match := _LAYER_TAG.fullmatch(tag):
            groups.setdefault(match["name"], {})[int(match["number"])] = curve
    return {name: dict(sorted(layers.items())) for name, layers in sorted(groups.items())}


def plain_curves(curves: dict[str, Curve]) -> dict[str, Curve]:
    """The curves that are of no single layer, without the curriculum's stage."""
    return {tag: curve for tag, curve in curves.items() if tag != STAGE_TAG and not _LAYER_TAG.fullmatch(tag)}


def stages(curves: dict[str, Curve]) -> list[tuple[str, int, int]]:
    """Name, first and last logged step of each stage in turn; empty without a curriculum."""
    if STAGE_TAG not in curves:
        return []
    logged = zip(*curves[STAGE_TAG], strict=True)
    found = []
    for stage, group in itertools.groupby(logged, key=lambda pair: pair[1]):
        steps = [step for step, _ in group]
        found.append((f"stage {stage:g}", steps[0], steps[-1]))
    return found
