"""The schedule's position and shape, for checkpoints.

A run that goes on with other values of the schedule than the checkpoint's must say which ones count:
`--override-opt-param-scheduler` (the run's) or `--use-checkpoint-opt-param-scheduler` (the checkpoint's). The engine's
own loading asserts instead of telling the flag, does not keep WSD's part, and leaves the parameter groups' rates,
which are what it computes with, as they are.
"""

from pathlib import Path
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

_FLAGS = {
    "init_lr": "--lr-warmup-init",
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters",
    "lr_decay_style": "--lr-decay-style",
    "lr_decay_steps": "--lr-decay-iters or --train-iters",
    "wsd_decay_steps": "--lr-wsd-decay-iters",
    "lr_wsd_decay_style": "--lr-wsd-decay-style",
    "start_wd": "--start-weight-decay or --weight-decay",
    "end_wd": "--end-weight-decay or --weight-decay",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "--train-iters",
}
_WITHOUT_EFFECT_IF_CONSTANT = {
    "lr_decay_style": {"min_lr", "lr_decay_steps", "wsd_decay_steps", "lr_wsd_decay_style"},
    "wd_incr_style": {"wd_incr_steps"},
}
_GROUP_FIELDS = ("max_lr", "min_lr")


def capture(scheduler: OptimizerParamScheduler) -> dict[str, Any]:
    """The schedule as JSON values, and the rates of the parameter groups, which families may scale."""
    groups = [{name: group[name] for name in _GROUP_FIELDS} for group in scheduler.optimizer.param_groups]
    shape = {name: getattr(scheduler, name) for name in _FLAGS}
    return {"num_steps": scheduler.num_steps, "shape": shape, "groups": groups}


def restore(scheduler: OptimizerParamScheduler, state: dict[str, Any] | None, folder: Path) -> None:
    """Takes the position, and with `--use-checkpoint-opt-param-scheduler` the shape too.

    Args:
        scheduler: of this run.
        state: as `capture` gave it; None in a checkpoint that was imported.
        folder: the checkpoint, named in errors.

    Raises:
        ValueError: the shapes differ and neither flag says which one counts, or there is no schedule.
    """
    if state is None:
        raise ValueError(f"{folder}: holds an imported model and no run to go on with; add --finetune")
    if scheduler.use_checkpoint_opt_param_scheduler:
        _take_shape(scheduler, state, folder)
    elif not scheduler.override_opt_param_scheduler:
        _check_shape(scheduler, state["shape"], folder)
    move_to(scheduler, state["num_steps"])


def move_to(scheduler: OptimizerParamScheduler, samples: int) -> None:
    """Sets the schedule's position, and the rates that follow from it."""
    scheduler.num_steps = samples
    scheduler.step(increment=0)


def _take_shape(scheduler: OptimizerParamScheduler, state: dict[str, Any], folder: Path) -> None:
    groups = scheduler.optimizer.param_groups
    if len(groups) != len(state["groups"]):
        raise ValueError(
            f"--use-checkpoint-opt-param-scheduler: this run has {len(groups)} groups of parameters with rates of "
            f"their own, {folder} has {len(state['groups'])}"
        )
    for name, value in state["shape"].items():
        setattr(scheduler, name, value)
    for group, stored in zip(groups, state["groups"], strict=True):
        group.update(stored)


def _check_shape(scheduler: OptimizerParamScheduler, stored: dict[str, Any], folder: Path) -> None:
    idle = {
        name
        for style, names in _WITHOUT_EFFECT_IF_CONSTANT.items()
        if getattr(scheduler, style) == "constant" == stored[style]
        for name in names
    }
    for name, flag in _FLAGS.items():
        ours, theirs = getattr(scheduler, name), stored[name]
        if name not in idle and ours != theirs:
            raise ValueError(
                f"{flag}: the schedule's {name} is {ours} in this run and {theirs} in {folder}; "
                "add --override-opt-param-scheduler or --use-checkpoint-opt-param-scheduler"
            )
