"""How far a progressive training has come: `{save}/progressive.json`, replaced by a rename after every phase.

    {save}/progressive.json                     the rack, and what each finished phase took and gave
    {save}/progressive_stack_{i}/iter_.../      of a stack's training; the next grows from the last one
    {save}/progressive_joint/iter_.../          of the joint phase
    {save}/progressive_rack/iter_.../           the complete rack, after the last phase

A phase is finished from the moment at which `progressive.json` says so.
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
from megatron_ext.training.checkpoint.run_directory import sections_of

FILE = "progressive.json"
FORMAT = "megatron_ext.progressive/1"
RACK = "progressive_rack"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A phase that has come to its end."""

    name: str
    """Of its directory."""

    first_iteration: int
    """Steps done before it, over the whole training."""

    iteration: int
    """Steps done at its end."""

    consumed_samples: int
    """Sequences taken from the training set at its end."""

    layers: int
    """Of its model."""

    trainable_parameters: int
    frozen_parameters: int
    stack_bytes: list[int]
    """Bytes of the weights of every stack as they were stored, by index; the most on any rank."""

    peak_memory_bytes: int
    """The process's highest use of memory until the end of the phase, on the rank where it was highest."""

    seconds: float
    """Wall time of the phase, of the command that ended it."""

    stack_treatments: list[str] = field(default_factory=list)
    """What was done with every stack, by index (`plan.TREATMENTS`); empty in files of before this was noted."""

    stack_precisions: list[str | None] = field(default_factory=list)
    """Of every stack in this phase, by index, the same; None where it is the run's."""


@dataclass(frozen=True, kw_only=True)
class History:
    """What is known of a training."""

    rack: Rack = field(default_factory=Rack)
    """Of the phase begun last."""

    finished: tuple[Finished, ...] = ()
    """In their order."""

    def of(self, name: str) -> Finished | None:
        """A finished phase, None where it is not finished."""
        return next((phase for phase in self.finished if phase.name == name), None)


def read_history(save: Path) -> History:
    """What a directory holds; an empty history where no training has begun.

    Raises:
        ValueError: the file is damaged, or another program's.
        OSError: it cannot be read.
    """
    path = save / FILE
    if not path.is_file():
        return History()
    content = files.read_json(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: not of a progressive training of this program")
    try:
        finished = tuple(Finished(**phase) for phase in content["finished"])
        return History(rack=Rack.from_json(content["rack"]), finished=finished)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None


def write_history(save: Path, history: History) -> None:
    """Replaces the file."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "rack": history.rack.as_json(),
        "finished": [asdict(phase) for phase in history.finished],
    }
    save.mkdir(parents=True, exist_ok=True)
    files.replace_text(save / FILE, json.dumps(content, indent=1))


def finished_checkpoint(save: Path, name: str) -> Path:
    """The newest checkpoint's directory of a phase that is finished.

    Raises:
        FileNotFoundError: there is none: somebody has removed it.
    """
    folder = files.find_checkpoint(str(save / name))
    if folder is None:
        raise FileNotFoundError(f"--save {save / name}: holds no checkpoint, but this phase is finished")
    return folder


def stored_rack_defaults(save: Path, given: Mapping[str, Any]) -> Found:
    """Groups `model`, but for its layers, and `tokenizer` of a training in a directory, as defaults to go on with it.

    Args:
        save: the training's directory.
        given: field's name -> value, of the command line and the YAML file.

    Raises:
        ValueError, OSError: a file or a checkpoint is damaged.
    """
    # A finished phase whose checkpoint is gone is told when the training goes on from it.
    places = [save / phase.name for phase in reversed(read_history(save).finished)]
    places += files.checkpoints_below(save)
    folder = next((found for place in places if (found := files.find_checkpoint(str(place)))), None)
    sections = {} if folder is None else sections_of(folder, given, ("model", "tokenizer"))
    sections.get("model", {}).pop("num_layers", None)
    return Found(f"training in {save}", sections)


def publish_rack(save: Path, name: str) -> Path:
    """Makes the last checkpoint of a phase the complete rack, without copying where the file system can link.

    Args:
        save: the training's directory.
        name: of the last phase.

    Returns:
        The checkpoint's directory.

    Raises:
        FileNotFoundError: the phase's checkpoint is gone.
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
