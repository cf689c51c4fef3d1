"""Computes the ranks and factors of the form key_value from the moments of a layer.

    C = E x x^T        the covariance of x, which is u for fc1 and a for `down`; see `moments`
    M                  the metric for errors of x: an approximation x' has the error E (x - x')^T M (x - x')
    C^1/2 M C^1/2 = Y diag(s^2) Y^T                   s^2 in descending order

The best map of rank r, x' = P x, keeps the first r columns Y_r of Y. Its error is the sum of s_i^2 over i > r (Eckart
and Young, applied to M^1/2 C^1/2, whose right singular vectors are Y):

    x' = C^1/2 Y_r Y_r^T C^-1/2 x          A = C^-1/2 Y_r D  [h, r]        B = D^-1 Y_r^T C^1/2  [r, h]

The diagonal matrix D does not change the map. It gives column i of A and row i of B the same norm. In a real model,
these norms would otherwise differ by a factor of several hundred; Adam, whose steps have the same size everywhere,
would then change A too much and B hardly at all.

Without gradients M is diag(g) W^T W diag(g) for fc1, and the identity for `down`. Everything is in fp64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

FC1, DOWN = "fc1", "down"

Place = tuple[int, str]
"""Number of a layer, from 0, and fc1 or down. low_rank and outer_product use fc1's directions for gate and up."""


def place_of(layer: int, target: str) -> Place:
    """Returns the place of a target, `gate`, `up`, `fc1` or `down`, of a layer."""
    return layer, DOWN if target == DOWN else FC1


_SMALLEST = 3e-7
"""Lower limit of the eigenvalues of C, relative to the largest; smaller ones are raised to it before inversion."""

_RIDGE = 1e-7
"""Added to the diagonals of C and M, relative to their means, so that a direction without data does no harm."""


@dataclass(frozen=True)
class Spectrum:
    """The best low-rank map for each possible rank r, for one target of one layer."""

    squares: torch.Tensor
    """s^2 [h], in descending order: the reduction of the error by each further rank."""

    reads: torch.Tensor
    """C^-1/2 Y, [h, h]."""

    values: torch.Tensor
    """Y^T C^1/2, [h, h]."""

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A [h, r] and B [r, h] in fp64; column i of A has the norm of row i of B."""
        reads, values = self.reads[:, :rank], self.values[:rank]
        balance = (values.norm(dim=1) / reads.norm(dim=0)).sqrt()
        return reads * balance, values / balance[:, None]


def decompose(covariance: torch.Tensor, metric: torch.Tensor) -> Spectrum:
    """Returns the best map of x for every rank; `metric` measures the error.

    Args:
        covariance: C, [h, h] in fp64.
        metric: M, [h, h] in fp64.
    """
    values, vectors = torch.linalg.eigh(_with_ridge(covariance))
    roots = values.clamp_min(_SMALLEST * float(values[-1])).sqrt()
    root, inverse = (vectors * roots) @ vectors.t(), (vectors / roots) @ vectors.t()
    squares, directions = torch.linalg.eigh(root @ _with_ridge(metric) @ root)
    directions = directions.flip(1)
    return Spectrum(
        squares=squares.flip(0).clamp_min(0), reads=inverse @ directions, values=directions.t() @ root
    )


def _with_ridge(matrix: torch.Tensor) -> torch.Tensor:
    ridge = (_RIDGE * matrix.diagonal().mean()).clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def choose_ranks(
    gains: Mapping[Place, list[float]], total: int | None = None, error: float = 0.0
) -> dict[Place, int]:
    """Raises ranks from 1, each time where the error falls most, until their sum or the total error reaches its limit.

    Args:
        gains: maps (layer, target) to the gain of each further rank, in descending order.
        total: upper limit of the sum of the ranks, at least 1 per layer and target; None for no limit.
        error: limit of the total error; no rank is raised once the total error is at most this.

    Returns:
        The ranks, each at least 1.
    """
    ranks = dict.fromkeys(gains, 1)
    # Gains fall with the rank, so the largest gains always belong to the first ranks of a place.
    offers = sorted((-gain, place) for place, of_place in gains.items() for gain in of_place[1:])
    left = -sum(offer for offer, _ in offers)
    for offer, place in offers[: None if total is None else total - len(gains)]:
        if left <= error:
            break
        ranks[place] += 1
        left += offer
    return ranks
