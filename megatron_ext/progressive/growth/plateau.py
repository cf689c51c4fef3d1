"""Ends a stack's training early: the mean loss over the last p steps is not better by delta than over the p before."""

import math
from typing import Any


class Plateau:
    """Watches the losses of one run."""

    def __init__(self, patience: int | None, min_delta: float) -> None:
        """Args:
        patience: steps of one mean; None for never.
        min_delta: by how much the later mean must be lower.
        """
        self.patience = patience
        self.min_delta = min_delta
        self._losses: list[float] = []

    def add(self, loss: float) -> None:
        """Takes the loss of a step; one that is not finite, of a step that was skipped, does not count."""
        if self.patience is not None and math.isfinite(loss):
            self._losses = [*self._losses, loss][-2 * self.patience :]

    @property
    def is_reached(self) -> bool:
        """The loss has stopped falling."""
        patience = self.patience
        if patience is None or len(self._losses) < 2 * patience:
            return False
        return self._mean(self._losses[:patience]) - self._mean(self._losses[patience:]) < self.min_delta

    @staticmethod
    def _mean(losses: list[float]) -> float:
        return math.fsum(losses) / len(losses)

    def state_dict(self) -> dict[str, Any]:
        """The losses that count, as JSON values."""
        return {"losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self._losses = [] if self.patience is None else list(state["losses"])[-2 * self.patience :]
