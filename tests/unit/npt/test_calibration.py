"""The closed form's algebra: best maps, ranks for a budget, and sampled labels."""

import itertools

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.npt.calibration.factors import choose_ranks, decompose
from megatron_ext.npt.calibration.moments import sample_labels
from megatron_ext.platform.process_groups import initialize
from megatron_ext.testing.run_single import run_single

SIZE, TOKENS = 12, 500


def _moments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [n, h] of unequal directions, and the matrices C and M."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(0, -1, SIZE, dtype=torch.float64)
    mixing = torch.randn(2, SIZE, SIZE, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64) * scales @ mixing[0]
    return x, x.t() @ x, mixing[1] @ mixing[1].t()


def _error(x: torch.Tensor, metric: torch.Tensor, projected: torch.Tensor) -> float:
    difference = x - projected
    return float((difference @ metric * difference).sum())


def test_the_spectrum_is_the_error_and_no_other_map_of_the_rank_does_better() -> None:
    x, covariance, metric = _moments()
    found = decompose(covariance, metric)
    root = torch.linalg.cholesky(metric)
    # Eckart and Young: the best rank-r approximation of the errors' coordinates, without any constraint on the map.
    singular = torch.linalg.svdvals(x @ root)
    for rank in (1, 4, 9):
        reads, values = found.factors(rank)
        error = _error(x, metric, x @ reads @ values)
        assert error == pytest.approx(float(found.squares[rank:].sum()), rel=1e-3)
        assert error == pytest.approx(float(singular[rank:].square().sum()), rel=1e-3)
        plain = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
        assert error < _error(x, metric, x @ plain.t() @ plain)


def test_at_full_rank_the_map_is_the_identity_even_where_there_were_no_tokens() -> None:
    x, _, metric = _moments()
    few = x[:3]
    reads, values = decompose(few.t() @ few, metric).factors(SIZE)
    torch.testing.assert_close(reads @ values, torch.eye(SIZE, dtype=torch.float64), rtol=0, atol=1e-9)


def test_both_factors_of_a_direction_have_the_same_norm_whatever_the_size_of_the_tokens() -> None:
    _, covariance, metric = _moments()
    for size in (1e-4, 1e4):
        reads, values = decompose(size * covariance, metric).factors(5)
        torch.testing.assert_close(reads.norm(dim=0), values.norm(dim=1))


def test_ranks_for_a_budget_or_an_error_are_the_best_of_all_choices() -> None:
    gains = {(0, "fc1"): [8.0, 3.0, 1.0], (1, "fc1"): [4.0, 3.5, 0.1], (0, "down"): [5.0, 2.0, 0.5]}
    chosen = choose_ranks(gains, total=6)
    assert sum(chosen.values()) == 6

    def kept(ranks: dict[tuple[int, str], int]) -> float:
        return sum(sum(gains[place][:rank]) for place, rank in ranks.items())

    everything = kept(dict.fromkeys(gains, 3))
    choices = [dict(zip(gains, ranks, strict=True)) for ranks in itertools.product((1, 2, 3), repeat=3)]
    assert kept(chosen) == max(kept(choice) for choice in choices if sum(choice.values()) == 6)
    for error in (11.0, 5.0, 3.0, 0.0):
        ranks = choose_ranks(gains, error=error)
        small_enough = [sum(choice.values()) for choice in choices if everything - kept(choice) <= error]
        assert everything - kept(ranks) <= error and sum(ranks.values()) == min(small_enough)


def _frequencies() -> tuple[torch.Tensor, torch.Tensor]:
    initialize(ParallelConfig(), seed=1)
    logits = torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(2)).expand(20_000, 2, 9)
    uniform = torch.rand(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = sample_labels(logits, uniform, parallel_state.get_tensor_model_parallel_group())
    return torch.bincount(labels.flatten(), minlength=9) / labels.numel(), logits[0, 0].softmax(-1)


def test_labels_are_sampled_with_the_models_probabilities() -> None:
    found, expected = run_single(_frequencies)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
