"""Writes the optimizer's part of an exported Megatron-LM checkpoint: Adam's state, the schedule and the progress.

The format is that of Megatron-LM's distributed optimizer with --dist-ckpt-optim-fully-reshardable, which can be read
at any parallel layout. megatron-core can load this format into the Adam of Transformer Engine or Apex, but not into
torch's Adam, which it uses on a CPU, because torch's Adam keeps one step count per parameter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_ext.interop.checkpoint_without_model import CheckpointState
from megatron_ext.interop.megatron.megatron_names import Named
from megatron_ext.interop.megatron.megatron_progress import ADAM_ARGUMENTS, SCHEDULE_ARGUMENTS
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint.checkpointer import TrainingProgress
from megatron_ext.training.checkpoint.optimizer_state import MAIN_PARAM_PREFIX, PREFIX
from megatron_ext.training.engine.loss_scale import LOSS_SCALE

OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Entry for the optimizer in a checkpoint's content metadata."""

_KINDS = ("exp_avg.", "exp_avg_sq.", "param.")
_SCHEDULE = (
    "max_lr", "lr_warmup_steps", "lr_decay_style", "lr_decay_steps", "min_lr", "start_wd", "end_wd", "wd_incr_style",
    "wd_incr_steps",
)  # fmt: skip
"""Arguments that Megatron-LM's schedule stores in addition to its position."""


@dataclass(frozen=True, kw_only=True)
class OptimizerExport:
    """A run's state other than the model's weights."""

    progress: TrainingProgress
    step: int
    """Number of updates that Adam has made."""

    scheduler: Mapping[str, Any]
    """Result of `scheduler_state.scheduler_state_of`."""

    settings: Mapping[str, Any]
    """`ADAM_ARGUMENTS` and `SCHEDULE_ARGUMENTS` of the run."""

    loss_scale: Mapping[str, Any] | None
    """Result of `loss_scale.loss_scale_state`; None without fp16."""

    def content(self) -> dict[str, Any]:
        """Returns the content that Megatron-LM stores once for all ranks, except the arguments."""
        groups = [self._group(weight_decay) for weight_decay in (True, False)]
        optimizer: dict[str, Any] = {
            "optimizer": {"param_groups": groups},
            "param_state_sharding_type": OPTIMIZER_FORMAT["distrib_optim_sharding_type"],
        }
        if self.loss_scale is not None:
            scale = torch.tensor([self.loss_scale["scale"]], dtype=torch.float32)
            optimizer["grad_scaler"] = {**self.loss_scale, "scale": scale}
        shape = self.scheduler["shape"]
        return {
            "optimizer": optimizer,
            "opt_param_scheduler": {
                **{name: shape[name] for name in _SCHEDULE},
                "num_steps": self.scheduler["num_steps"],
            },
        }

    def arguments(self) -> dict[str, Any]:
        """Returns Megatron-LM's arguments that describe the run's progress and schedule."""
        return {
            **{name: self.settings.get(name) for name in SCHEDULE_ARGUMENTS},
            **{name: self.settings[name] for name in ADAM_ARGUMENTS},
            "optimizer": "adam",
            "iteration": self.progress.iteration,
            "consumed_train_samples": self.progress.consumed_samples,
            "no_save_optim": False,
            "use_distributed_optimizer": True,
        }

    def _group(self, weight_decay: bool) -> dict[str, Any]:
        settings, shape = self.settings, self.scheduler["shape"]
        return {
            "bias_correction": True,
            "betas": (settings["adam_beta1"], settings["adam_beta2"]),
            "eps": settings["adam_eps"],
            "step": self.step,
            # The schedule replaces these two before they are used.
            "lr": shape["max_lr"],
            "weight_decay": shape["start_wd"] if weight_decay else 0.0,
            "max_lr": shape["max_lr"],
            "min_lr": shape["min_lr"],
            "wd_mult": float(weight_decay),
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "default_config": True,
        }


def read_optimizer(folder: Path, run_config: Mapping[str, Any]) -> OptimizerExport:
    """Reads a run's state from its checkpoint.

    Args:
        folder: the checkpoint's directory.
        run_config: the checkpoint's configuration.

    Raises:
        ValueError: the checkpoint has no optimizer, or Megatron-LM cannot continue with it.
    """
    state = files.read_json(folder / files.STATE)
    if state["optimizer_step"] is None or state["scheduler"] is None:
        raise ValueError(f"{folder}: holds no optimizer state; export without --with-optimizer")
    settings = {
        name: value
        for section in run_config.values()
        if isinstance(section, Mapping)
        for name, value in section.items()
        if name in (*SCHEDULE_ARGUMENTS, *ADAM_ARGUMENTS, "decoupled_lr")
    }
    if settings.get("decoupled_lr") is not None:
        raise ValueError(
            f"{folder}: was trained with --decoupled-lr {settings['decoupled_lr']}, with which the optimizer cannot be "
            "exported; export without --with-optimizer"
        )
    if not all(name in settings for name in ADAM_ARGUMENTS):
        raise ValueError(
            f"{folder}: lacks Adam's constants, because an earlier version of this package imported the checkpoint; "
            "import it again"
        )
    return OptimizerExport(
        progress=TrainingProgress(**state["progress"]),
        step=state["optimizer_step"],
        scheduler=state["scheduler"],
        settings=settings,
        loss_scale=state.get(LOSS_SCALE),
    )


def optimizer_tensors(tensors: list[Named], state: CheckpointState) -> Iterator[Named]:
    """Yields the optimizer's tensors with their names in `state` and in Megatron-LM."""
    for kind in _KINDS:
        for tensor in tensors:
            theirs = f"{PREFIX}{kind}{tensor.theirs}"
            ours = f"{PREFIX}{kind}{tensor.name}"
            # In fp32, the optimizer updates the model's own weights.
            is_models = ours.startswith(MAIN_PARAM_PREFIX) and ours not in state
            yield replace(tensor, name=tensor.name if is_models else ours, theirs=theirs)
