"""Each update rule of rows, step by step, against torch's optimizers or the formula; a skipped step changes nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_ext.per_layer.sparse.row_updates import UPDATES, AdamConstants, StepFacts
from megatron_ext.testing.run_single import run_single

_RATE, _DECAY = 1e-2, 0.1
_GROUP = {"lr": _RATE, "weight_decay": _DECAY}
Step = Callable[[torch.Tensor], torch.Tensor]
"""Takes a gradient, and returns the weights after the update."""


def _adamw(weights: torch.Tensor) -> Step:
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW(
        [parameter], betas=(0.9, 0.99), eps=1e-8, fused=True, lr=_RATE, weight_decay=_DECAY
    )

    def step(gradient: torch.Tensor) -> torch.Tensor:
        parameter.grad = gradient
        optimizer.step()
        return parameter.detach()

    return step


def _sgd(weights: torch.Tensor) -> Step:
    parameter = torch.nn.Parameter(weights.clone())
    # torch's weight decay adds to the gradient, which is the same without momentum.
    optimizer = torch.optim.SGD([parameter], lr=_RATE, weight_decay=_DECAY)

    def step(gradient: torch.Tensor) -> torch.Tensor:
        parameter.grad = gradient
        optimizer.step()
        return parameter.detach()

    return step


def _rowwise_adagrad(weights: torch.Tensor) -> Step:
    values, sums = weights.tolist(), [[0.0] * weights.size(1) for _ in weights]

    def step(gradient: torch.Tensor) -> torch.Tensor:
        for table, of_table in enumerate(gradient.tolist()):
            for row, columns in enumerate(of_table):
                sums[table][row] += sum(g * g for g in columns) / len(columns)
                rate = 1e-2 / (sums[table][row] ** 0.5 + 1e-8)
                values[table][row] = [
                    w * (1 - 1e-2 * 0.1) - rate * g for w, g in zip(values[table][row], columns, strict=True)
                ]
        return torch.tensor(values)

    return step


_REFERENCES = {"adam": _adamw, "lazy_adam": _adamw, "sgd": _sgd, "rowwise_adagrad": _rowwise_adagrad}


def _compare(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rule = UPDATES[name](AdamConstants(0.9, 0.99, 1e-8), dist.group.WORLD)  # type: ignore[arg-type]
    rows = torch.randn(2, 5, 4, generator=generator)
    reference = _REFERENCES[name](rows)
    state = {key: torch.zeros(2, 5, width or 4) for key, width in rule.width_of_state.items()}
    yes = torch.tensor(True)
    for earlier in range(5):
        gradient = torch.randn(2, 5, 4, generator=generator)
        rule.update(rows, gradient, state, StepFacts(_GROUP, torch.tensor([earlier]), yes))
        torch.testing.assert_close(rows, reference(gradient), rtol=1e-6, atol=1e-7)
    before = [tensor.clone() for tensor in (rows, *state.values())]
    rule.update(rows, torch.full_like(rows, float("nan")), state, StepFacts(_GROUP, torch.tensor([5]), ~yes))
    assert all(torch.equal(*pair) for pair in zip(before, (rows, *state.values()), strict=True))


@pytest.mark.parametrize("name", UPDATES)
def test_a_rule_updates_rows_as_its_reference_does_and_nothing_if_the_step_is_skipped(name: str) -> None:
    run_single(_compare, name)
