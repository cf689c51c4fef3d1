"""Finds the linear map from x to y with the smallest squared error, from sums over tokens (no token is stored).

    X = sum x x^T [k, k],  Y = sum x y^T [k, j],  sum |y|^2           x [k] and y [j] belong to one token
    R = (X + penalties)^-1 Y                                          y' = x R
    error left = (|y|^2 - 2 <R, Y> + <R, X R>) / |y|^2                relative to |y|^2

The sums of micro-batches and ranks can be added up. All values are in fp64. X is scaled to a diagonal of ones before
a ridge is added, so that the result does not depend on the units of x.
"""

from dataclasses import dataclass

import torch

from megatron_ext.platform import process_groups

RIDGE = 1e-4
"""Added to the diagonal of the scaled X, so that a direction without data does no harm."""


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
            penalty: P, [k, k]. The term r^T P r, summed over the columns r of R, is added to the squared error.
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
