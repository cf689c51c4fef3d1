"""Metrics of one training step, and their means over a log interval.

The means exclude the losses of a skipped step (with a non-finite loss or gradient), but include its time and tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one optimizer step."""

    losses: Mapping[str, float]
    """Means over the step's tokens by name: `lm loss`, and the model families' losses and values."""

    learning_rate: float
    """Learning rate of this step."""

    grad_norm: float | None
    """Global norm of the gradient before clipping; None if it was not computed."""

    batch_size: int
    """Sequences in the step, over all processes."""

    tokens: int
    """Tokens in the step, over all processes."""

    consumed_samples: int
    """Sequences used in training so far, this step included."""

    seconds: float
    """Wall time of the step, without evaluation and checkpoints."""

    flops_per_token: float
    """Model FLOPs per token of this step, forward and backward, model families included."""

    skipped: bool = False
    """Whether the step was skipped, so that the parameters are unchanged."""

    params_norm: float | None = None
    """Global norm of the parameters; None if it was not computed."""

    num_zeros: float | None = None
    """Number of elements of the gradient that are zero; None if they were not counted."""

    loss_scale: float | None = None
    """Loss scale after the step; None without `--fp16`."""

    @property
    def has_nan(self) -> bool:
        """Whether a loss or the gradient norm is not finite."""
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

    def add(self, metrics: StepMetrics) -> None:
        """Adds one step."""
        self.steps += 1
        self.seconds += metrics.seconds
        self.tokens += metrics.tokens
        self.flops += metrics.tokens * metrics.flops_per_token
        self.skipped += metrics.skipped
        self.nan += metrics.has_nan
        for name, value in metrics.losses.items():
            if math.isfinite(value) and not metrics.skipped:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    @property
    def losses(self) -> dict[str, float]:
        """Mean losses over the steps that were not skipped, by name."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    @property
    def seconds_per_step(self) -> float:
        """Mean wall time per step."""
        return self.seconds / max(1, self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all processes."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def flops_per_second(self) -> float:
        """Model FLOPs per second over all processes."""
        return self.flops / self.seconds if self.seconds > 0 else 0.0
