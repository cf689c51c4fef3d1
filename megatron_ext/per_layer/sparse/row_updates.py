"""The update rules for rows of tables; `rows` and `gradient` are [L, n, q]: L tables, the step's n rows, q columns.

    adam              AdamW as for all other parameters; the missed steps of a row are applied before its next use
    lazy_adam         AdamW for the rows of the step only; a row that is not looked up does not change
    rowwise_adagrad   s <- s + mean_p(g^2);  w <- (1 - lr wd) w - lr g / (sqrt(s) + eps);  s is one number per row
    sgd               w <- (1 - lr wd) w - lr g;  the decay of missed steps is applied later, as for adam

In both kinds of Adam the bias correction counts all steps. Sources: arXiv 1711.05101 (AdamW), torch's `SparseAdam`
(lazy_adam), arXiv 2104.05158 (rowwise_adagrad). The mean over p is over all tensor-parallel ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

State = dict[str, torch.Tensor]
"""Optimizer state of rows, by name; every tensor is updated in place."""


@dataclass(frozen=True)
class AdamConstants:
    """Adam's constants."""

    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class StepFacts:
    """The facts about a step that an update needs."""

    group: dict[str, Any]
    """The parameter group, with `lr` and `weight_decay`."""

    earlier: torch.Tensor
    """Number of updates before this one, [1] integer on the device."""

    is_applied: torch.Tensor
    """Whether the update is applied: a boolean scalar on the device."""


class RowUpdate:
    """Base class of the update rules."""

    catches_up = False
    """Whether rows that a step does not look up change as well; these changes are applied later."""

    momentum = 0.0
    """Adam's beta1 if the momentum keeps moving rows that are not looked up, otherwise 0."""

    width_of_state: Mapping[str, int | None] = MappingProxyType({})
    """Number of columns of each state tensor; None for the table's number of columns on this rank."""

    def __init__(self, constants: AdamConstants, tensor_group: dist.ProcessGroup) -> None:
        """Args:
        constants: Adam's constants.
        tensor_group: the ranks over which the columns of a row are split.
        """
        self.constants = constants
        self.tensor_group = tensor_group

    def update(self, rows: torch.Tensor, gradient: torch.Tensor, state: State, step: StepFacts) -> None:
        """Updates the rows and their state in place."""
        raise NotImplementedError


class LazyAdam(RowUpdate):
    """AdamW for the rows of the step only; see the top of this file."""

    width_of_state = MappingProxyType({"exp_avg": None, "exp_avg_sq": None})

    def update(self, rows: torch.Tensor, gradient: torch.Tensor, state: State, step: StepFacts) -> None:
        """Applies torch's fused AdamW, which the engine's optimizer also uses."""
        # The kernel reads the number of updates from the device and increments it.
        count = step.earlier.float().squeeze(0)
        adamw(
            [rows],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [count],
            fused=True,
            found_inf=(~step.is_applied).float(),
            amsgrad=False,
            maximize=False,
            beta1=self.constants.beta1,
            beta2=self.constants.beta2,
            eps=self.constants.eps,
            lr=step.group["lr"],
            weight_decay=step.group["weight_decay"],
        )


class Adam(LazyAdam):
    """AdamW with the same result as if all rows were updated in every step."""

    catches_up = True

    @property
    def momentum(self) -> float:  # type: ignore[override]
        """Adam's beta1."""
        return self.constants.beta1


class Sgd(RowUpdate):
    """Gradient descent without momentum."""

    catches_up = True

    def update(self, rows: torch.Tensor, gradient: torch.Tensor, state: State, step: StepFacts) -> None:
        """Applies the rule at the top of this file."""
        rate = step.group["lr"]
        changed = (rows * (1 - rate * step.group["weight_decay"])).sub_(gradient, alpha=rate)
        rows.copy_(changed.where(step.is_applied, rows))


class RowwiseAdagrad(RowUpdate):
    """Adagrad with one sum of squares per row."""

    width_of_state = MappingProxyType({"row_sum": 1})

    def update(self, rows: torch.Tensor, gradient: torch.Tensor, state: State, step: StepFacts) -> None:
        """Applies the rule at the top of this file. Collective over the tensor-parallel ranks."""
        squares = gradient.square().sum(-1, keepdim=True)
        dist.all_reduce(squares, group=self.tensor_group)
        total = state["row_sum"] + squares / (gradient.size(-1) * self.tensor_group.size())
        rate = step.group["lr"]
        changed = rows * (1 - rate * step.group["weight_decay"])
        changed.addcdiv_(gradient, total.sqrt().add_(self.constants.eps).expand_as(gradient), value=-rate)
        rows.copy_(changed.where(step.is_applied, rows))
        state["row_sum"].copy_(total.where(step.is_applied, state["row_sum"]))


UPDATES: dict[str, type[RowUpdate]] = {
    "adam": Adam,
    "lazy_adam": LazyAdam,
    "rowwise_adagrad": RowwiseAdagrad,
    "sgd": Sgd,
}
"""The update rules, by value of `--per-layer-optimizer`."""
