"""Unmasking gives the same tokens at every parallel layout."""

from megatron_ext.testing.run_distributed import run_distributed
from megatron_ext.testing.tiny_training import LAYOUTS
from tests.unit.progressive.test_unmasking import generate_all, generated


def test_the_tokens_follow_from_the_seed_and_are_the_same_at_every_parallel_layout() -> None:
    expected = {name: found for name, (found, _) in generated().items()}
    assert expected["drawn"] != expected["another seed"]
    assert expected["greedy"] != expected["drawn"]
    for layout in ("TP2", "PP2"):
        for of_rank in run_distributed(generate_all, 2, LAYOUTS[layout]):
            assert {name: found for name, (found, _) in of_rank.items()} == expected
