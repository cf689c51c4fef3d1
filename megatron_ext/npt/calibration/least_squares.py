"""Least squares from sums over tokens: finds the linear map from x to y with the smallest error, keeping no token.

    X = sum x x^T [k, k],  Y = sum x y^T [k, j],  |y|^2 summed        x [k] and y [j] of each token
    R = (X + penalties)^-1 Y                                          y' = x R
    error left = (|y|^2 - 2 <R, Y> + <R, X R>) / |y|^2                relative to the square of y

The sums are additive over micro-batches and ranks. Everything is in fp64. X is scaled to a diagonal of ones before a
ridge is added to it, so that the result does not depend on the units of x.
"""

from dataclasses import dataclass

import torch

from megatron_ext.platform import process_groups

RIDGE = 1e-4
"""Added to the diagonal of X, relative to it, so that directions without tokens stay harmless."""


@dataclass
class LeastSquares:
    """Sums over tokens of x, y and their products."""

    inputs: torch.Tensor
    """X, [k, k]."""

    products: torch.Tensor
    """Y, [k, j]."""

    squares: torch.Tensor
    """Sum of |y|^2, [1]."""

    @classmethod
    def zeros(cls, inputs: int, outputs: int) -> "LeastSquares":
        """Returns sums over zero tokens, for x with `inputs` values and y with `outputs` values."""
        shapes = ((inputs, inputs), (inputs, outputs), (1,))
        device = process_groups.device()
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def parts(self) -> list[torch.Tensor]:
        """Returns the sums."""
        return [self.inputs, self.products, self.squares]

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds tokens; x [n, k], y [n, j]."""
        x, y = x.double(), y.double()
        self.inputs.addmm_(x.t(), x)
        self.products.addmm_(x.t(), y)
        self.squares += y.square().sum()

    def solve(self, penalty: torch.Tensor | None = None) -> torch.Tensor:
        """Returns R, [k, j].

        Args:
            penalty: P [k, k]: the sum over columns r of R of r^T P r is added to the squared error.
        """
        scales = self.inputs.diagonal().clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        matrix = self.inputs if penalty is None else self.inputs + penalty
        matrix = scales.unsqueeze(1) * matrix * scales
        matrix = matrix + RIDGE * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return scales.unsqueeze(1) * torch.linalg.solve(matrix, scales.unsqueeze(1) * self.products)

    def error_left(self, solution: torch.Tensor) -> float:
        """Returns the squared error of x R relative to the square of y."""
        error = self.squares - 2 * (solution * self.products).sum()
        error = error + (solution * (self.inputs @ solution)).sum()
        return float(error / self.squares.clamp_min(torch.finfo(torch.float64).tiny))
