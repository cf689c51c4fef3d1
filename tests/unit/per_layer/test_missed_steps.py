"""What AdamW does to a row in steps that do not look it up: the closed form against AdamW that does every step."""

import math
from collections.abc import Callable

import pytest
import torch

from megatron_ext.per_layer.sparse.missed_steps import MissedSteps

_EPS, _STEPS = 1e-8, 400
_YES = torch.tensor(True)
Snapshot = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _rate(step: int) -> float:
    return 1e-3 * (1 + 0.5 * math.sin(step / 20))


def _train(beta1: float, beta2: float, dtype: torch.dtype) -> dict[int, Snapshot]:
    """Weights and moments after every step; there are gradients in steps 1, 2 and 5, of 1e-12 to 1 in size."""
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** torch.empty(4, 500, dtype=torch.float64).uniform_(-12, 0, generator=generator)
    parameter = torch.nn.Parameter((torch.randn(4, 500, generator=generator) * 0.02).to(dtype))
    adam = torch.optim.AdamW([parameter], betas=(beta1, beta2), eps=_EPS, weight_decay=0.1, fused=True)
    snapshots = {}
    for step in range(1, _STEPS + 1):
        noise = torch.randn(4, 500, generator=generator)
        parameter.grad = (sizes * noise).to(dtype) if step in (1, 2, 5) else torch.zeros_like(parameter)
        adam.param_groups[0]["lr"] = _rate(step)
        adam.step()
        state = adam.state[parameter]
        snapshots[step] = tuple(
            tensor.detach().double().clone() for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])
        )
    return snapshots  # type: ignore[return-value]


def _missed(beta1: float, beta2: float, first: int = 0) -> MissedSteps:
    return MissedSteps(beta1, beta2, _EPS, torch.tensor([first]))


def _caught_up(missed: MissedSteps, since: int, snapshot: Snapshot) -> torch.Tensor:
    weight, mean, square = snapshot
    steps = torch.full((4,), since)
    total = torch.zeros_like(weight)
    for factor, shift in missed.moment_terms(steps):
        total += factor[:, None] / (square.sqrt() + _EPS * shift[:, None])
    return weight * missed.decay(steps)[:, None] - mean * total


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.9, 0.95), (0.95, 0.99), (0.0, 0.999)])
def test_a_row_that_missed_up_to_395_steps_is_where_adamw_would_have_moved_it(
    betas: tuple[float, float],
) -> None:
    exact, single = (_train(*betas, dtype) for dtype in (torch.float64, torch.float32))
    missed = _missed(*betas)
    for step in range(1, _STEPS + 1):
        missed.record(_rate(step), 0.1, _YES)
        for since in (5, 6, 10, 60):
            if step in (since, since + 1, since + 7, _STEPS):
                found = _caught_up(missed, since, exact[since])
                # One update moves a weight by about 1e-3.
                assert (found - exact[step][0]).abs().max() < 1e-7, (since, step)
                # AdamW itself, in fp32, is this far from the exact result.
                assert (single[step][0] - exact[step][0]).abs().max() < 5e-7


def test_few_steps_are_summed_exactly() -> None:
    exact = _train(0.9, 0.999, torch.float64)
    missed = _missed(0.9, 0.999)
    for step in (*range(1, 8),):
        missed.record(_rate(step), 0.1, _YES)
    torch.testing.assert_close(_caught_up(missed, 5, exact[5]), exact[7][0], rtol=0, atol=1e-15)


@pytest.mark.parametrize("host_reads", [True, False])
def test_rows_that_missed_different_steps_do_not_mix(host_reads: bool) -> None:
    missed = _missed(0.9, 0.999)
    for step in range(1, 41):
        missed.record(_rate(step), 0.1, _YES)
    together = torch.tensor([40, 3, 38])
    one_by_one: Callable[[int], list[tuple[torch.Tensor, torch.Tensor]]] = lambda step: missed.moment_terms(  # noqa: E731
        torch.tensor([step])
    )
    root = torch.tensor([1e-9, 1e-4, 1.0], dtype=torch.float64)
    total = sum(a / (root + _EPS * c) for a, c in missed.moment_terms(together, host_reads=host_reads))
    alone = [
        sum((a / (value + _EPS * c)).item() for a, c in one_by_one(step))
        for step, value in zip((40, 3, 38), root.tolist(), strict=True)
    ]
    assert alone[0] == 0.0
    torch.testing.assert_close(total, torch.tensor(alone, dtype=torch.float64), rtol=1e-12, atol=0)


def test_steps_are_forgotten_once_all_rows_are_up_to_date_and_kept_beyond_any_fixed_number() -> None:
    missed = _missed(0.9, 0.999, first=7)
    for _ in range(3000):
        missed.record(1e-3, 0.1, _YES)
    assert missed.last == 3007
    torch.testing.assert_close(
        missed.decay(torch.tensor([7, 3007])), torch.tensor([0.9999**3000, 1.0]).double()
    )
    missed.restart(torch.tensor([3007]))
    assert missed.decay(torch.tensor([3007])).item() == 1.0
