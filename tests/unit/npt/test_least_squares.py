"""Least squares from sums: against torch.linalg.lstsq on the whole data."""

import pytest
import torch

from megatron_ext.npt.calibration.least_squares import RIDGE, LeastSquares


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    """x of very unequal sizes [n, k], and y [n, j] that is partly linear in x."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 7, generator=generator, dtype=torch.float64) * torch.logspace(
        -3, 3, 7, dtype=torch.float64
    )
    noise = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    return x, (x / x.std(0)) @ torch.randn(7, 3, generator=generator, dtype=torch.float64) + noise


def _sums(x: torch.Tensor, y: torch.Tensor, pieces: int) -> LeastSquares:
    found = LeastSquares.zeros(x.size(1), y.size(1))
    for part, wanted in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        found.add(part, wanted)
    return found


def test_the_solution_and_its_error_are_those_of_lstsq_on_the_whole_data() -> None:
    x, y = _data()
    sums = _sums(x, y, 5)
    scale = x.square().sum(0).rsqrt()
    # The ridge as 7 more tokens.
    rows = torch.cat([x * scale, RIDGE**0.5 * torch.eye(7, dtype=torch.float64)])
    expected = scale.unsqueeze(1) * torch.linalg.lstsq(rows, torch.cat([y, y.new_zeros(7, 3)])).solution
    torch.testing.assert_close(sums.solve(), expected, rtol=1e-9, atol=1e-12)
    error = float((x @ expected - y).square().sum() / y.square().sum())
    assert sums.error_left(expected) == pytest.approx(error, rel=1e-9)
    unpenalised = torch.linalg.lstsq(x, y).solution
    best = float((x @ unpenalised - y).square().sum() / y.square().sum())
    assert best <= error < 1.001 * best


def test_sums_of_parts_add_up_to_the_sums_of_all_tokens() -> None:
    x, y = _data()
    whole, first, second = _sums(x, y, 1), _sums(x[:150], y[:150], 3), _sums(x[150:], y[150:], 2)
    for a, b, c in zip(whole.parts(), first.parts(), second.parts(), strict=True):
        torch.testing.assert_close(a, b + c)


def test_the_penalty_is_that_of_lstsq_with_further_tokens() -> None:
    x, y = _data()
    generator = torch.Generator().manual_seed(2)
    away = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    found = _sums(x, y, 2).solve(away.t() @ away)
    expected = torch.linalg.lstsq(torch.cat([x, away]), torch.cat([y, y.new_zeros(50, 3)])).solution
    sizes = x.square().sum(0).sqrt().unsqueeze(1)
    torch.testing.assert_close(found * sizes, expected * sizes, rtol=1e-2, atol=1e-2)


def test_directions_without_tokens_stay_finite_and_zero() -> None:
    x, y = _data()
    x[:, 2] = 0
    solution = _sums(x, y, 2).solve()
    assert solution.isfinite().all() and not solution[2].any()
