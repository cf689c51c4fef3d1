"""Detects a plateau: the mean loss of the last p steps is less than delta below the mean loss of the p steps before."""

import math
from typing import Any


class Plateau:
    """Detects a plateau in the losses of one run."""

    def __init__(self, patience: int | None, min_delta: float) -> None:
        """Args:
        patience: p, the number of steps in each of the two means; None disables the detection.
        min_delta: delta, the required decrease of the mean loss.
        """
        self.patience = patience
        self.min_delta = min_delta
        self._losses: list[float] = []

    def add(self, loss: float) -> None:
        """Adds the loss of a step. A loss that is not finite is ignored, because its step was skipped."""
        if self.patience is not None and math.isfinite(loss):
            self._losses = [*self._losses, loss][-2 * self.patience :]

    @property
    def is_reached(self) -> bool:
        """Whether the loss has stopped falling."""
        patience = self.patience
        if patience is None or len(self._losses) < 2 * patience:
            return False
        return self._mean(self._losses[:patience]) - self._mean(self._losses[patience:]) < self.min_delta

    @staticmethod
    def _mean(losses: list[float]) -> float:
        return math.fsum(losses) / len(losses)

    def state_dict(self) -> dict[str, Any]:
        """Returns the recent losses as JSON values."""
        return {"losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the result of `state_dict`."""
        self._losses = [] if self.patience is None else list(state["losses"])[-2 * self.patience :]
