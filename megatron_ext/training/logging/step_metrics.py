"""What one training step tells, and its averages over a log interval.

A step that was skipped, because its loss or gradient was not finite, is counted and its losses are left out of the
averages. Its time and tokens count: they were spent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, as rank 0 knows it."""

    losses: Mapping[str, float]
    """Means over the step's tokens by name: `lm loss`, and what families add."""

    learning_rate: float
    """Used in this step."""

    grad_norm: float | None
    """Global norm before clipping; None where none was computed."""

    batch_size: int
    """Sequences in the step, over all processes."""

    tokens: int
    """Tokens in the step, over all processes."""

    consumed_samples: int
    """Sequences used in training so far, this step included."""

    seconds: float
    """Wall time of the step, without evaluation and checkpoints."""

    skipped: bool = False
    """The parameters did not move."""

    params_norm: float | None = None
    """Global norm of the parameters; None where it is not asked for."""

    @property
    def has_nan(self) -> bool:
        """A loss or the gradient norm is not finite."""
        values = [*self.losses.values(), 0.0 if self.grad_norm is None else self.grad_norm]
        return not all(math.isfinite(value) for value in values)


@dataclass
class Interval:
    """Sums over the steps of one log interval."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    skipped: int = 0
    nan: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: StepMetrics, flops_per_token: float) -> None:
        """Takes one step in, of so many model FLOPs a token."""
        self.steps += 1
        self.seconds += metrics.seconds
        self.tokens += metrics.tokens
        self.flops += metrics.tokens * flops_per_token
        self.skipped += metrics.skipped
        self.nan += metrics.has_nan
        for name, value in metrics.losses.items():
            if math.isfinite(value) and not metrics.skipped:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    @property
    def losses(self) -> dict[str, float]:
        """Means over the steps that were not skipped."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    @property
    def seconds_per_step(self) -> float:
        """Mean wall time of a step."""
        return self.seconds / max(1, self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Over all processes."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def flops_per_second(self) -> float:
        """Model FLOPs over all processes."""
        return self.flops / self.seconds if self.seconds > 0 else 0.0
