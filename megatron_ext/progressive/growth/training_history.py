"""The progress of progressive training, stored in `{save}/progressive.json`.

The directory of `--save` contains:

    {save}/progressive.json                     the model's stacks, and figures of each finished phase
    {save}/progressive_stack_{i}/iter_.../      checkpoints of the phase of stack i; the next phase grows from the last
    {save}/progressive_joint/iter_.../          checkpoints of the joint phase
    {save}/progressive_rack/iter_.../           the complete model, after the last phase

A phase is finished once `progressive.json` lists it. The file is replaced whole, by a rename, after every phase.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.merge import Found
from megatron_ext.progressive.growth.rack import Rack
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint.run_directory import (
    checkpoint_args,
    sections_of,
)

FILE = "progressive.json"
FORMAT = "megatron_ext.progressive/1"
RACK = "progressive_rack"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The figures of a finished phase."""

    name: str
    """Name of the phase, and of its directory."""

    first_iteration: int
    """Number of steps before the phase began, counted over all phases."""

    iteration: int
    """Number of steps at the end of the phase, counted over all phases."""

    consumed_samples: int
    """Number of training sequences consumed by the end of the phase."""

    layers: int
    """Number of layers of the phase's model."""

    trainable_parameters: int
    frozen_parameters: int
    stack_bytes: list[int]
    """Bytes of the weights of every stack, by index, on the rank where the stack was largest."""

    peak_memory_bytes: int
    """Peak memory of the process by the end of the phase, on the rank where it was largest."""

    seconds: float
    """Wall time of the phase; if the phase was interrupted, the time of the last command only."""

    stack_treatments: list[str] = field(default_factory=list)
    """Treatment of each stack in the phase, by index: one of `trunk_strategy.TREATMENTS`. Empty in older files."""

    stack_precisions: list[str | None] = field(default_factory=list)
    """Precision of each stack in this phase, by index; None means the run's precision. Empty in older files."""


@dataclass(frozen=True, kw_only=True)
class History:
    """The progress of a progressive training run."""

    rack: Rack = field(default_factory=Rack)
    """The stacks of the phase that was started last."""

    finished: tuple[Finished, ...] = ()
    """The finished phases, in order."""

    def of(self, name: str) -> Finished | None:
        """Returns the finished phase with this name; None if it is not finished."""
        return next((phase for phase in self.finished if phase.name == name), None)


def read_history(save: Path) -> History:
    """Reads the history of the run in a directory; returns an empty history if no run has begun there.

    Raises:
        ValueError: the file is damaged, or was written by another program.
        OSError: the file cannot be read.
    """
    path = save / FILE
    if not path.is_file():
        return History()
    content = files.read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by progressive training of this package")
    try:
        finished = tuple(Finished(**phase) for phase in content["finished"])
        return History(rack=Rack.from_json(content["rack"]), finished=finished)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_history(save: Path, history: History) -> None:
    """Replaces `progressive.json`."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "rack": history.rack.as_json(),
        "finished": [asdict(phase) for phase in history.finished],
    }
    save.mkdir(parents=True, exist_ok=True)
    files.replace_text(save / FILE, json.dumps(content, indent=1))


def finished_checkpoint(save: Path, name: str) -> Path:
    """Returns the directory of the newest checkpoint of a finished phase.

    Raises:
        FileNotFoundError: the phase's checkpoint is missing, because it was removed.
    """
    folder = files.find_checkpoint(str(save / name))
    if folder is None:
        raise FileNotFoundError(
            f"{save / name}: the checkpoint of this finished phase is missing; restore it, or pass another --save to "
            "start a new run"
        )
    return folder


def stored_rack_defaults(save: Path, given: Mapping[str, Any]) -> list[Found]:
    """Returns the defaults that come from the run in `save`: the config groups `model`, without `num_layers`, and
    `tokenizer`. With `--use-checkpoint-args`, also the model's shape, which overrides the user's flags.

    Args:
        save: the training run's directory.
        given: values set on the command line or in the YAML file, by field name.

    Raises:
        ValueError, OSError: a file or a checkpoint is damaged.
    """
    # A missing checkpoint of a finished phase is reported later, when the next phase grows from it.
    places = [save / phase.name for phase in reversed(read_history(save).finished)]
    places += files.checkpoints_below(save)
    folder = next((found for place in places if (found := files.find_checkpoint(str(place)))), None)
    if folder is None:
        return []
    sections = sections_of(folder, given, ("model", "tokenizer"))
    sections["model"].pop("num_layers", None)
    own = Found(f"training in {save}", sections)
    return [own, *checkpoint_args(folder, given, omitted=("num_layers",))]


def publish_rack(save: Path, name: str) -> Path:
    """Publishes the last checkpoint of a phase as the complete model; hard-links its files if possible, or copies them.

    Args:
        save: the training run's directory.
        name: name of the last phase.

    Returns:
        The directory of the published checkpoint.

    Raises:
        FileNotFoundError: the phase's checkpoint is missing.
    """
    source = finished_checkpoint(save, name)
    root = save / RACK
    files.begin(root, source.name)
    folder = files.writing_folder(root, source.name)
    shutil.copytree(source, folder, copy_function=_link, dirs_exist_ok=True)
    files.publish(root, source.name)
    files.prune(root, 1, files.step_of(source.name) or 0)
    return root / source.name


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
