"""Collects sums during the forward passes of one step; `per_layer_statistics` computes the statistics from them.

Every sum is per layer and additive over micro-batches, tokens and ranks that hold different parts of a tensor, so one
all-reduce completes it. Shapes: [L, ...], one row per layer.
"""

import torch


class Recorder:
    """Accumulates sums by name, each a float64 tensor [L] on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add_squares(self, name: str, values: torch.Tensor, factor: float = 1.0) -> None:
        """Adds the sum of squares of `values * factor`, [L, ...], to `{name}_squares`."""
        self._add(f"{name}_squares", _sum(values.float().square()) * factor**2)

    @torch.no_grad()
    def add_mean(self, name: str, values: torch.Tensor) -> None:
        """Adds the sums for mean and variance of `values`, [L, ...]: `{name}_sum`, `_squares` and `_count`."""
        self._add(f"{name}_sum", _sum(values.float()))
        self.add_squares(name, values)
        self._add(f"{name}_count", torch.full_like(self.sums[f"{name}_sum"], values[0].numel()))

    def add_parts(self, context: torch.Tensor, token: torch.Tensor, token_factor: float) -> None:
        """Adds the squares of the two parts of a combined vector; `token` is multiplied by `token_factor` first."""
        self.add_squares("combination_context", context)
        self.add_squares("combination_token", token, token_factor)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value


def _sum(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(1).sum(1, dtype=torch.float64)
