"""Checks whether a run may load from its --load directory and write to its --save directory, from file names alone.

A run starts from scratch only if there is nothing to load: no directory, or an empty one. A run writes only to a
directory without checkpoints or to the directory from which it resumes; --overwrite-checkpoints permits replacing the
checkpoints of another run.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.command_line.field_checks import flag_name
from megatron_ext.config.command_line.merge import Found
from megatron_ext.config.groups.checkpoint_config import CheckpointConfig
from megatron_ext.models.transformer_engine import on_this_machine
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint import incomplete_checkpoints as kinds
from megatron_ext.training.checkpoint.same_run_checks import SHAPE_FIELDS


def check_directories(config: CheckpointConfig, *, writes: bool) -> None:
    """Checks that a run may load from and write to the directories that its flags name.

    Called on every rank before the process group starts, and again on rank 0 when the run has locked its directory,
    because another run may have written to it in between.

    Args:
        config: the run's checkpoint flags.
        writes: whether the run trains, and therefore saves if --save is given.

    Raises:
        ValueError: a directory contains checkpoints that would be lost, or something that cannot be loaded.
        OSError: a directory cannot be read, or the step of `--ckpt-step` does not exist.
    """
    folder = checkpoint_to_load(config)
    if folder is None and config.load is not None and not writes:
        raise ValueError(f"--load {config.load}: no checkpoint found, and --skip-train needs one to evaluate")
    if config.save is None or config.overwrite_checkpoints or not writes:
        return
    step = step_to_go_on_from(config, folder)
    if step is None:
        check_unused(
            Path(config.save),
            f"to continue it pass --load {config.save}{' without --finetune' if config.finetune else ''}; to start "
            "another run pass another directory as --save, or --overwrite-checkpoints to replace it",
        )
        return
    later = later_steps(config, step)
    if later and _is_chosen(config):
        raise ValueError(
            f"--save {config.save}: contains {later}, which are later than the loaded step {step}; "
            f"to continue from the newest pass --load {config.save} without --ckpt-step; to continue from step {step} "
            "pass another directory as --save, or --overwrite-checkpoints to replace the later checkpoints"
        )


def check_unused(save: Path, remedy: str, but_for: Collection[str] = ()) -> None:
    """Checks that a directory neither contains checkpoints nor is one itself.

    Args:
        save: the directory.
        remedy: what the user can do, appended to the error.
        but_for: names of series files (see `incomplete_checkpoints.SERIES`) that the directory may contain.

    Raises:
        ValueError: the directory is in use.
    """
    names = kinds.entries(save)
    steps = files.step_folders(save)
    series = [name for name in kinds.SERIES if name in names and name not in but_for]
    if files.CHECKSUMS in names:
        raise ValueError(f"--save {save}: is itself a checkpoint; pass a directory for checkpoints")
    if steps or "release" in names:
        raise ValueError(f"--save {save}: contains another run (steps {_listed(steps)}); {remedy}")
    if series:
        raise ValueError(f"--save {save}: contains a series of training runs ({series[0]}); {remedy}")


def checkpoint_to_load(config: CheckpointConfig) -> Path | None:
    """Returns the checkpoint that a run loads, or None if it starts from scratch.

    A run starts from scratch if --load is omitted, or if it equals --save and contains no checkpoint yet.

    Raises:
        ValueError, OSError: see `find_checkpoint`; or --load differs from --save and contains no checkpoint.
    """
    if config.load is None:
        return None
    folder = files.find_checkpoint(config.load, config.ckpt_step)
    if folder is None and not _same(config.load, config.save):
        # --save itself may contain other files (logs, curves) before the first checkpoint.
        names = [name for name in kinds.entries(Path(config.load)) if not name.startswith(".")]
        there = f"contains no checkpoint, only {_listed(names)}" if names else "no checkpoint found"
        raise ValueError(
            f"--load {config.load}: {there}; omit --load to start from scratch, or make it equal to --save"
        )
    return folder


def stored_defaults(given: Mapping[str, Any], names: Sequence[str]) -> list[Found]:
    """Returns config groups stored in the checkpoint of `--load`, as defaults for the run that loads it.

    Args:
        given: the fields given on the command line or in the YAML file, by name; without `load` the result is empty.
        names: names of the groups; the tokenizer's group is omitted if `--tokenizer-type` differs.

    Raises:
        ValueError, OSError: see `find_checkpoint`; or the configuration file is damaged.
    """
    folder = files.find_checkpoint(given["load"], given.get("ckpt_step")) if "load" in given else None
    check_checkpoint_args(given, "load")
    if folder is None:
        return []
    return [
        Found(f"checkpoint {folder}", sections_of(folder, given, names)),
        *checkpoint_args(folder, given),
    ]


def check_checkpoint_args(given: Mapping[str, Any], *sources: str) -> None:
    """Raises `ValueError` if `--use-checkpoint-args` is given without any of the fields `sources`.

    Each of these fields can name a checkpoint. As in Megatron-LM, the named directory may have no checkpoint yet; the
    run then uses the given flags.
    """
    if given.get("use_checkpoint_args") and not given.keys() & set(sources):
        raise ValueError(f"--use-checkpoint-args: requires {' or '.join(map(flag_name, sources))}")


def checkpoint_args(folder: Path, given: Mapping[str, Any], *, omitted: Sequence[str] = ()) -> list[Found]:
    """Returns the model's shape in a checkpoint, which replaces the given flags.

    Without `--use-checkpoint-args`, returns an empty list.

    Args:
        folder: the checkpoint's directory.
        given: the fields given on the command line or in the YAML file, by name.
        omitted: fields of the shape that are not taken from the checkpoint.
    """
    if not given.get("use_checkpoint_args"):
        return []
    stored = files.read_json(folder / files.RUN_CONFIG)["model"]
    shape = {name: stored.get(name) for name in SHAPE_FIELDS if name not in omitted}
    return [Found(f"checkpoint {folder}", {"model": shape}, wins=True)]


def sections_of(folder: Path, given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Returns config groups of one checkpoint, by name; the arguments are those of `stored_defaults`."""
    files.verify_checkpoint(folder, names=[files.RUN_CONFIG])
    stored = files.read_json(folder / files.RUN_CONFIG)
    found = {name: stored[name] for name in names if name in stored}
    if "model" in found:
        found["model"] = on_this_machine(found["model"])
    if given.get("tokenizer_type") not in (None, stored["tokenizer"]["tokenizer_type"]):
        found.pop("tokenizer", None)
    return found


def step_to_go_on_from(config: CheckpointConfig, folder: Path | None) -> int | None:
    """Returns the loaded checkpoint's step if the run continues in that checkpoint's directory, otherwise None."""
    if folder is None or config.finetune or not _same(folder.resolve().parent, config.save):
        return None
    return files.step_of(folder.resolve().name.removeprefix(files.REPLACED))


def later_steps(config: CheckpointConfig, step: int | None) -> str:
    """Lists, in words, the checkpoints in --save that are later than `step`; "" if there are none or `step` is None."""
    if config.save is None or step is None:
        return ""
    later = [other for other in files.step_folders(Path(config.save)) if other > step]
    return f"checkpoints of steps {_listed(later)}" if later else ""


def _is_chosen(config: CheckpointConfig) -> bool:
    # If the user chose the step, later steps belong to a run that would be overwritten. Otherwise the tracker chose it,
    # and later steps are remains of this run's own interrupted save.
    return config.ckpt_step is not None or not _same(config.load, config.save)


def _same(one: str | Path | None, other: str | Path | None) -> bool:
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def _listed(values: Iterable[object]) -> str:
    shown = list(map(str, values))
    return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])
