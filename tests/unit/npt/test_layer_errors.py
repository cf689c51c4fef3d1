"""Errors per token relative to the target, massive tokens, and the choice of the layers that hold a model back."""

import math

import numpy as np
import pytest

from megatron_ext.npt.evaluation.layer_ablation import holding_back
from megatron_ext.npt.evaluation.layer_errors import layer_errors


def _squares(targets: list[float], trained: list[float], untrained: list[float]) -> np.ndarray:
    """From norms of the targets, and errors relative to them."""
    target = np.array(targets)
    columns = [target, np.array(trained) * target, np.array(untrained) * target]
    return np.square(np.stack(columns, axis=1)).astype(np.float32)


def test_one_massive_token_dominates_the_overall_error_but_not_median_and_tail() -> None:
    squares = _squares([1.0] * 199 + [1000.0], [0.1] * 199 + [2.0], [0.5] * 200)
    found = layer_errors({3: [squares]})[3]
    assert found["trained_overall"] == pytest.approx(2.0, rel=1e-3)
    assert found["trained"]["percentiles"]["p50"] == pytest.approx(0.1)
    assert found["trained"]["percentiles"]["p99"] == pytest.approx(0.1)
    assert found["trained"]["max"] == pytest.approx(2.0)
    assert found["massive_tokens"] == 1
    share = 1e6 / (1e6 + 199)
    assert (found["massive_share"], found["largest_share"]) == (pytest.approx(share), pytest.approx(share))


def test_the_overall_error_hides_what_ordinary_tokens_lose_beside_a_massive_one() -> None:
    squares = _squares([1.0] * 199 + [1000.0], [0.6] * 199 + [0.0], [0.5] * 200)
    found = layer_errors({0: [squares]})[0]
    assert found["trained_overall"] < 0.01
    assert found["trained"]["percentiles"]["p50"] == pytest.approx(0.6)


def test_a_token_below_a_hundred_medians_is_not_massive() -> None:
    found = layer_errors({0: [_squares([1.0] * 9 + [9.9], [0.0] * 10, [0.0] * 10)]})[0]
    assert (found["massive_tokens"], found["massive_share"]) == (0, 0.0)
    assert found["largest_share"] == pytest.approx(98.01 / 107.01)


def test_quantiles_of_several_ranks_are_those_of_all_tokens_together() -> None:
    rng = np.random.default_rng(0)
    squares = rng.random((301, 3)).astype(np.float32)
    one = layer_errors({0: [squares]})[0]
    parts = layer_errors({0: [squares[200:], squares[:7], squares[7:200]]})[0]
    assert parts["trained"]["percentiles"] == one["trained"]["percentiles"]
    by_hand = np.sqrt(squares[:, 1].astype(np.float64) / squares[:, 0])
    assert one["trained"]["percentiles"]["p99"] == pytest.approx(np.percentile(by_hand, 99))
    assert one["untrained_overall"] == pytest.approx(math.sqrt(squares[:, 2].sum() / squares[:, 0].sum()))


def test_a_target_of_zero_is_counted_and_does_not_spoil_the_rest() -> None:
    found = layer_errors({0: [np.array([[0, 1, 1], [1, 0.25, 0.25]], np.float32)]})[0]
    assert (found["trained"]["not_finite"], found["trained"]["mean"]) == (1, 0.5)


def test_the_fewest_layers_with_half_of_all_reductions_hold_the_model_back() -> None:
    assert holding_back({4: 0.1, 5: 0.5, 6: 0.3, 7: 0.05, 8: -0.2}) == [5]
    assert holding_back({4: 0.1, 5: 0.2, 6: 0.3, 7: 0.2}) == [6, 5]


def test_no_layer_holds_a_model_back_that_no_layer_worsens() -> None:
    assert holding_back({4: 0.0, 5: -0.1}) == []


def test_a_reduction_that_is_not_a_number_is_left_out() -> None:
    assert holding_back({4: math.nan, 5: 0.1}) == [5]
