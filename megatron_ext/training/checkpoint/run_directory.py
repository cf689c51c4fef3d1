"""May a run load from its --load and write to its --save? Nothing is read but names, nothing is written.

A run begins from scratch only where there is nothing to load: no directory, or an empty one. It writes only where it
loses nothing: there, or where it goes on from what is there. `--overwrite-checkpoints` takes the place of another run.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.config.groups.model_config import on_this_machine
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import incomplete_checkpoints as kinds


def check_directories(config: CheckpointConfig, *, writes: bool) -> None:
    """Raises unless a run may load and write as its flags say.

    Called on every rank before the process group starts, and again, on rank 0, when the run has locked its directory:
    another run may have come and gone in between.

    Args:
        config: of the run.
        writes: it trains, and saves if --save is given.

    Raises:
        ValueError: something is there that would be lost, or that cannot be loaded.
        OSError: a directory cannot be read, or `--ckpt-step` is not there.
    """
    folder = checkpoint_to_load(config)
    if folder is None and config.load is not None and not writes:
        raise ValueError(f"--load {config.load}: no checkpoint there, and --skip-train has no other model")
    if config.save is None or config.overwrite_checkpoints or not writes:
        return
    step = step_to_go_on_from(config, folder)
    if step is None:
        check_unused(
            Path(config.save),
            f"to go on with it give --load {config.save}{' without --finetune' if config.finetune else ''}, to begin "
            "another one give an empty --save, or --overwrite-checkpoints to replace it",
        )
        return
    later = later_steps(config, step)
    if later and _is_chosen(config):
        raise ValueError(
            f"--save {config.save}: holds {later}, after the step {step} that is loaded; "
            f"to go on from the newest give --load {config.save} alone, else another --save, or "
            "--overwrite-checkpoints to replace them"
        )


def check_unused(save: Path, remedy: str, but_for: Collection[str] = ()) -> None:
    """Raises `ValueError` where a directory holds checkpoints, or is one.

    Args:
        save: the directory.
        remedy: the end of the message.
        but_for: file of the series of trainings that may be in it, one of `checkpoint_kinds.SERIES`.
    """
    names = kinds.entries(save)
    steps = files.step_folders(save)
    series = [name for name in kinds.SERIES if name in names and name not in but_for]
    if files.CHECKSUMS in names:
        raise ValueError(f"--save {save}: is a checkpoint itself; give a directory for checkpoints")
    if steps or "release" in names:
        raise ValueError(f"--save {save}: holds another run (steps {_listed(steps)}); {remedy}")
    if series:
        raise ValueError(f"--save {save}: holds a series of trainings ({series[0]}); {remedy}")


def checkpoint_to_load(config: CheckpointConfig) -> Path | None:
    """The checkpoint that a run begins with, None where it begins from scratch: without --load, or in --save itself.

    Raises:
        ValueError, OSError: see `find_checkpoint`; or a directory other than --save holds none.
    """
    if config.load is None:
        return None
    folder = files.find_checkpoint(config.load, config.ckpt_step)
    if folder is None and not _same(config.load, config.save):
        # In --save itself nothing, or other things (logs, curves), may lie before the first checkpoint does.
        names = [name for name in kinds.entries(Path(config.load)) if not name.startswith(".")]
        there = f"holds no checkpoint (there: {_listed(names)})" if names else "no checkpoint there"
        raise ValueError(
            f"--load {config.load}: {there}; leave it out to start from scratch, or give the directory of --save"
        )
    return folder


def stored_defaults(given: Mapping[str, Any], names: Sequence[str]) -> list[Found]:
    """Groups of the configuration with which the checkpoint of `--load` was made, as defaults of a run that loads it.

    Args:
        given: field's name -> value, of the command line and the YAML file; without `load` nothing is found.
        names: of the groups that are wanted; another `--tokenizer-type` leaves out the tokenizer's.

    Raises:
        ValueError, OSError: see `find_checkpoint`; or the configuration is damaged.
    """
    folder = files.find_checkpoint(given["load"], given.get("ckpt_step")) if "load" in given else None
    return [] if folder is None else [Found(f"checkpoint {folder}", sections_of(folder, given, names))]


def sections_of(folder: Path, given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The same of a checkpoint's own directory."""
    files.verify_checkpoint(folder, names=[files.RUN_CONFIG])
    stored = files.read_json(folder / files.RUN_CONFIG)
    found = {name: stored[name] for name in names if name in stored}
    if "model" in found:
        found["model"] = on_this_machine(found["model"])
    if given.get("tokenizer_type") not in (None, stored["tokenizer"]["tokenizer_type"]):
        found.pop("tokenizer", None)
    return found


def step_to_go_on_from(config: CheckpointConfig, folder: Path | None) -> int | None:
    """The step of the checkpoint that is loaded where the run goes on in that checkpoint's own directory, else None."""
    if folder is None or config.finetune or not _same(folder.resolve().parent, config.save):
        return None
    return files.step_of(folder.resolve().name.removeprefix(files.REPLACED))


def later_steps(config: CheckpointConfig, step: int | None) -> str:
    """In words, the checkpoints in --save after a step; empty where there are none, or the step is None."""
    if config.save is None or step is None:
        return ""
    later = [other for other in files.step_folders(Path(config.save)) if other > step]
    return f"checkpoints of steps {_listed(later)}" if later else ""


def _is_chosen(config: CheckpointConfig) -> bool:
    """True where the step was chosen, not found: then steps after it are no remains of this run's own last save."""
    return config.ckpt_step is not None or not _same(config.load, config.save)


def _same(one: str | Path | None, other: str | Path | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def _listed(values: Iterable[object]) -> str:
    shown = list(map(str, values))
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])
