"""Reads the progress of a Megatron-LM run: steps, samples, Adam's step count and the learning-rate schedule."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.training.checkpoint.checkpointer import TrainingProgress

SCHEDULE_ARGUMENTS = (
    "lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples", "lr_warmup_init", "lr_warmup_iters",
    "lr_warmup_samples", "lr_warmup_fraction", "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
    "train_iters", "train_samples", "global_batch_size", "micro_batch_size", "weight_decay", "start_weight_decay",
    "end_weight_decay", "weight_decay_incr_style",
)  # fmt: skip
"""Arguments on which the schedule depends. If a resumed run changes one of them, the error shows both values."""

ADAM_ARGUMENTS = ("adam_beta1", "adam_beta2", "adam_eps")
"""Arguments that an export of the optimizer needs."""

_ADAM_DEFAULTS = (0.9, 0.999, 1e-8)


@dataclass(frozen=True, kw_only=True)
class MegatronProgress:
    """Data, other than tensors, that is needed to continue a Megatron-LM run."""

    progress: TrainingProgress
    optimizer_step: int
    """Number of updates that Adam has made."""

    scheduler: dict[str, Any]
    """State of the schedule: the result of `scheduler_state.scheduler_state_of`."""

    arguments: dict[str, Any]
    """`SCHEDULE_ARGUMENTS` and `ADAM_ARGUMENTS` of the run."""

    loss_scale: dict[str, Any] | None
    """Result of `loss_scale.loss_scale_state`; None without fp16."""


def read_progress(common: Mapping[str, Any], arguments: Mapping[str, Any], source: str) -> MegatronProgress:
    """Reads the progress from a checkpoint's common part.

    Args:
        common: content of `common.pt`.
        arguments: the training arguments in `common.pt`, by name.
        source: path of the file, for error messages.

    Raises:
        ValueError: a required entry is missing, or the optimizer is not Adam.
    """
    kind = arguments.get("optimizer", "adam")
    if kind != "adam":
        raise ValueError(
            f"{source}: --optimizer {kind}: only Adam's state can be imported; leave out --with-optimizer"
        )
    steps = set(_steps(common.get("optimizer")))
    schedule = common.get("opt_param_scheduler")
    if len(steps) != 1 or not isinstance(schedule, dict):
        what = "exactly one step count of Adam" if isinstance(schedule, dict) else "a learning-rate schedule"
        raise ValueError(f"{source}: does not contain {what}; import without --with-optimizer")
    iteration = common.get("iteration")
    if not isinstance(iteration, int):
        raise ValueError(f"{source}: has no iteration; import without --with-optimizer")
    progress = TrainingProgress(
        iteration=iteration, consumed_samples=int(arguments.get("consumed_train_samples") or 0)
    )
    return MegatronProgress(
        progress=progress,
        optimizer_step=steps.pop(),
        scheduler=_scheduler(schedule, common.get("optimizer"), arguments),
        arguments={
            **{name: arguments.get(name) for name in SCHEDULE_ARGUMENTS},
            **{
                name: arguments.get(name, default)
                for name, default in zip(ADAM_ARGUMENTS, _ADAM_DEFAULTS, strict=True)
            },
        },
        loss_scale=_loss_scale(common.get("optimizer")),
    )


def _loss_scale(state: Any) -> dict[str, Any] | None:
    """Returns the state of the loss scaler in an optimizer's state; None if there is none."""
    if not isinstance(state, dict):
        return None
    if isinstance(state.get("grad_scaler"), dict):
        scaler = state["grad_scaler"]
        return {**scaler, "scale": float(scaler["scale"])}
    return next(filter(None, map(_loss_scale, state.values())), None)


def _groups(state: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the parameter groups in an optimizer's state."""
    if not isinstance(state, dict):
        return
    for name, value in state.items():
        if name == "param_groups":
            yield from value
        else:
            yield from _groups(value)


def _steps(state: Any) -> Iterator[int]:
    """Yields Adam's step counts: one for all parameters (torch's Adam), or one per group."""
    for group in _groups(state):
        if group.get("step") is not None:
            yield int(group["step"])
    yield from _common_steps(state)


def _common_steps(state: Any) -> Iterator[int]:
    if isinstance(state, dict):
        for name, value in state.items():
            if name == "common_step":
                yield int(value)
            else:
                yield from _common_steps(value)


def _scheduler(schedule: Mapping[str, Any], optimizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    decay = arguments.get("lr_wsd_decay_samples")
    if decay is None and arguments.get("lr_wsd_decay_iters") is not None:
        decay = arguments["lr_wsd_decay_iters"] * arguments["global_batch_size"]
    shape = {
        "init_lr": arguments.get("lr_warmup_init") or 0.0,
        **{name: value for name, value in schedule.items() if name != "num_steps"},
        "wsd_decay_steps": decay,
        "lr_wsd_decay_style": arguments.get("lr_wsd_decay_style") or "exponential",  # the default
    }
    rates = [{name: group.get(name) for name in ("max_lr", "min_lr")} for group in _groups(optimizer)]
    return {"num_steps": schedule["num_steps"], "shape": shape, "groups": rates}
