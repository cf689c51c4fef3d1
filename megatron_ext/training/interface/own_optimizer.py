"""Base class for optimizers with which a model family reduces gradients and updates parameters itself.

For every parameter that it trains, megatron-core stores and reduces a gradient of every element, and updates every
element. A model family that needs less sets `requires_grad` of such a parameter to False, so that the engine's
gradient buffers and optimizer skip the parameter, and supplies an `OwnOptimizer`. The `OwnOptimizer` is chained to
the engine's optimizer, so that learning rate, gradient norm, clipping, skipped steps and checkpoints apply to both.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer


@dataclass(frozen=True)
class HeldState:
    """The part of a parameter's state that is on this rank."""

    parameter: torch.Tensor
    """The model's parameter."""

    tensors: dict[str, torch.Tensor]
    """The state by name: `param` for fp32 main weights, `exp_avg` and `exp_avg_sq` for Adam's moments, others."""

    start: int
    """First row of the parameter whose state is on this rank."""

    end: int
    """Last row plus one."""


class OwnOptimizer(MegatronOptimizer):
    """Base class; a step calls `prepare_grads`, reads `gradients`, scales them, and calls `step_with_ready_grads`."""

    is_stub_optimizer = False

    def __init__(self, engine: MegatronOptimizer, group: dict[str, Any]) -> None:
        """Args:
        engine: the engine's optimizer, to which this one will be chained.
        group: entries that replace those of the optimizer's single parameter group, such as `max_lr` and `min_lr`;
            `params` is not among them.
        """
        # Do not call the base class's `__init__`, which requires an optimizer of torch.
        first, *_ = getattr(engine, "chained_optimizers", [engine])
        self.optimizer = None
        self.config = first.config
        self.is_applied = torch.ones((), dtype=torch.bool)
        """Whether the next `step_with_ready_grads` makes an update: a boolean scalar on the device."""

        self.grad_stats_parallel_group = first.get_grad_stats_parallel_group()
        self.is_distributed = isinstance(first, DistributedOptimizer)
        """Whether the engine divides the optimizer's state among data-parallel ranks."""

        self.host_group: dist.ProcessGroup | None = getattr(first, "data_parallel_group_gloo", None)
        """The group of data-parallel ranks for tensors in CPU memory; None if the usual group accepts such
        tensors.
        """

        self._groups = [
            {
                "params": [],
                "is_expert_parallel": False,
                "default_config": False,  # the logged learning rate is that of the engine's parameters
                "wd_mult": 1.0,
                "lr_mult": 1.0,
                "is_decoupled_lr": False,
                "max_lr": self.config.lr,
                "min_lr": self.config.min_lr,
                **group,
            }
        ]
        if self.config.fp16:
            _unscale_together(first, self)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The single parameter group; the scheduler writes `lr` and `weight_decay` into it."""
        return self._groups

    def get_parameters(self) -> list[torch.Tensor]:
        """Returns the tensors whose attribute `grad` is scaled by clipping."""
        parameters: list[torch.Tensor] = self._groups[0]["params"]
        return parameters

    @abstractmethod
    def reduce(self) -> None:
        """Reduces the gradients over data-parallel ranks if that has not been done in this step. Collective."""

    @abstractmethod
    def gradients(self) -> list[torch.Tensor]:
        """Returns this rank's reduced gradients, which are equal on all data-parallel ranks."""

    @abstractmethod
    def data_parallel_rank(self) -> int:
        """Returns this rank's index among the ranks that hold the same gradients."""

    @abstractmethod
    def bring_up_to_date(self) -> None:
        """Carries out all postponed updates, so that parameters and state are those after the last step."""

    @abstractmethod
    def held(self) -> Iterator[HeldState]:
        """Yields the state of every parameter on this rank, to fill from a checkpoint."""

    @abstractmethod
    def whole(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Yields every parameter with its complete state, to be saved; possibly on the first data-parallel rank only.
        Collective.
        """

    @abstractmethod
    def step_count(self) -> int:
        """Returns the number of updates so far."""

    @abstractmethod
    def restored(self, step: int) -> None:
        """Called when the tensors of `held` have been filled with the state after `step` updates."""

    def get_main_grads_for_grad_norm(self) -> list[torch.Tensor]:
        """Returns the gradients that this rank adds to the global norm."""
        # The distributed optimizer also sums over data-parallel ranks, which all hold these gradients, so only the
        # first rank adds them.
        return [] if self.is_distributed and self.data_parallel_rank() else self.gradients()

    get_grads_for_grad_norm = get_main_grads_for_grad_norm  # the method's name from megatron-core 0.19 on

    def get_loss_scale(self) -> torch.Tensor:
        """Returns 1, because the engine's optimizer scales the loss."""
        return torch.ones(1, device=torch.cuda.current_device())

    def step(self) -> None:
        """Not used, because `Stepper` runs the parts of a step."""
        raise NotImplementedError

    def state_dict(self) -> None:
        """Not used, because `OptimizerState` saves the state."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Any) -> None:
        """Not used, because `OptimizerState` loads the state."""
        raise NotImplementedError

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Not used, because `OptimizerState` saves the state."""
        raise NotImplementedError


def _unscale_together(engine: Any, own: OwnOptimizer) -> None:
    """Makes the engine's fp16 optimizer unscale the gradients of `own`, and lower the loss scale if they overflow."""
    collect = engine._collect_main_grad_data_for_unscaling

    def collect_all() -> list[torch.Tensor]:
        own.reduce()
        return [*collect(), *own.gradients()]

    engine._collect_main_grad_data_for_unscaling = collect_all


def own_optimizers(optimizer: MegatronOptimizer) -> list[OwnOptimizer]:
    """Returns the model families' optimizers that are chained to the engine's optimizer."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, OwnOptimizer)]


def bring_up_to_date(optimizer: MegatronOptimizer) -> None:
    """Carries out all postponed updates; call this before any code outside of a training step reads parameters."""
    for own in own_optimizers(optimizer):
        own.bring_up_to_date()
