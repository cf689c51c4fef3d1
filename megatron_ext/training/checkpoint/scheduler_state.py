"""Saves and restores the learning-rate schedule: its position and its settings.

If the settings of a resumed run differ from the checkpoint's, the user must choose: `--override-opt-param-scheduler`
uses the run's settings, `--use-checkpoint-opt-param-scheduler` the checkpoint's. megatron-core's loading is not used:
it fails with an assertion that names no flag, ignores the settings of WSD (warm-up, stable, decay), and does not
restore the parameter groups' rates, from which the learning rate is computed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.config.command_line.field_checks import flag_name

_LENGTH = ("stack_steps", "stack_tokens", "train_iters", "train_samples")
_BATCH = (
    "global_batch_size",
    "rampup_batch_size",
    "step_batch_size_schedule",
    "gradient_accumulation_steps",
    "micro_batch_size",
)
_SETTINGS: dict[str, tuple[str, ...]] = {
    "init_lr": ("lr_warmup_init",),
    "max_lr": ("lr",),
    "min_lr": ("min_lr",),
    "lr_warmup_steps": ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", *_LENGTH, *_BATCH),
    "lr_decay_steps": ("lr_decay_iters", "lr_decay_samples", *_LENGTH, *_BATCH),
    "lr_decay_style": ("lr_decay_style",),
    "wsd_decay_steps": ("lr_wsd_decay_iters", "lr_wsd_decay_samples", *_BATCH),
    "lr_wsd_decay_style": ("lr_wsd_decay_style",),
    "start_wd": ("start_weight_decay", "weight_decay"),
    "end_wd": ("end_weight_decay", "weight_decay"),
    "wd_incr_style": ("weight_decay_incr_style",),
    "wd_incr_steps": (*_LENGTH, *_BATCH),
}
"""Maps each attribute of the schedule (lengths are in samples) to the fields of the configuration on which it
depends.
"""

_WITHOUT_EFFECT_IF_CONSTANT = {
    "lr_decay_style": {"min_lr", "lr_decay_steps", "wsd_decay_steps", "lr_wsd_decay_style"},
    "wd_incr_style": {"wd_incr_steps"},
}
_GROUP_FIELDS = ("max_lr", "min_lr")


def scheduler_state_of(scheduler: OptimizerParamScheduler) -> dict[str, Any]:
    """Returns the schedule, and the rates of the parameter groups (which model families may scale), as JSON
    values.
    """
    groups = [{name: group[name] for name in _GROUP_FIELDS} for group in scheduler.optimizer.param_groups]
    shape = {name: getattr(scheduler, name) for name in _SETTINGS}
    return {"num_steps": scheduler.num_steps, "shape": shape, "groups": groups}


def restore_scheduler(
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any] | None,
    folder: Path,
    *,
    run: Mapping[str, Any],
    stored: Mapping[str, Any],
) -> None:
    """Restores the schedule's position, and with `--use-checkpoint-opt-param-scheduler` the settings as well.

    Args:
        scheduler: this run's schedule.
        state: the state from `scheduler_state_of`; None in an imported checkpoint.
        folder: the checkpoint's directory, named in errors.
        run: the run's `run_config`, with the settings as the user gave them.
        stored: the checkpoint's `run_config`.

    Raises:
        ValueError: the settings differ and neither flag is given, or `state` is None.
    """
    if state is None:
        raise ValueError(
            f"{folder}: contains an imported model, not a run that can be resumed; add --finetune"
        )
    if scheduler.use_checkpoint_opt_param_scheduler:
        _take_shape(scheduler, state, folder)
    elif not scheduler.override_opt_param_scheduler:
        _check_shape(scheduler, state["shape"], folder, _fields(run), _fields(stored))
    move_to(scheduler, state["num_steps"])


def move_to(scheduler: OptimizerParamScheduler, samples: int) -> None:
    """Sets the schedule's position to `samples`, and updates the learning rates accordingly."""
    scheduler.num_steps = samples
    scheduler.step(increment=0)


def _take_shape(scheduler: OptimizerParamScheduler, state: dict[str, Any], folder: Path) -> None:
    groups = scheduler.optimizer.param_groups
    if len(groups) != len(state["groups"]):
        raise ValueError(
            f"--use-checkpoint-opt-param-scheduler: this run has {len(groups)} parameter groups, but {folder} has "
            f"{len(state['groups'])}; use --override-opt-param-scheduler instead"
        )
    for name, value in state["shape"].items():
        setattr(scheduler, name, value)
    for group, stored in zip(groups, state["groups"], strict=True):
        group.update(stored)


def _check_shape(
    scheduler: OptimizerParamScheduler,
    stored: Mapping[str, Any],
    folder: Path,
    our_fields: Mapping[str, Any],
    their_fields: Mapping[str, Any],
) -> None:
    idle = {
        name
        for style, names in _WITHOUT_EFFECT_IF_CONSTANT.items()
        if getattr(scheduler, style) == "constant" == stored[style]
        for name in names
    }
    differing: dict[str, tuple[Any, Any]] = {}
    for name, fields in _SETTINGS.items():
        ours, theirs = getattr(scheduler, name), stored[name]
        if name in idle or ours == theirs:
            continue
        typed = [field for field in fields if our_fields.get(field) != their_fields.get(field)]
        if typed:
            differing[typed[0]] = our_fields.get(typed[0]), their_fields.get(typed[0])
        else:
            # The values are equal in steps: only the data-parallel size, and with it the samples per step, has
            # changed.
            differing[fields[0]] = ours, theirs
    if differing:
        ours_told = ", ".join(f"{flag_name(name)} {_told(pair[0])}" for name, pair in differing.items())
        theirs_told = ", ".join(_told(pair[1]) for pair in differing.values())
        raise ValueError(
            f"{ours_told}: the schedule in {folder} was made with {theirs_told}; to continue with this "
            "run's schedule, add --override-opt-param-scheduler; to continue with the checkpoint's schedule, add "
            "--use-checkpoint-opt-param-scheduler"
        )


def _fields(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all fields of a run's configuration by name; no two sections have a field of the same name."""
    sections = [section for name, section in run_config.items() if name != "families"]
    return {
        name: value for section in sections if isinstance(section, Mapping) for name, value in section.items()
    }


def _told(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "none" if value is None else str(value)
