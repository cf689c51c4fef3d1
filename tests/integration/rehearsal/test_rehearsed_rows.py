"""A rehearsal of tables that are trained by rows (--per-layer-sparse) counts the rows of a step, not whole tables."""

import pytest

from megatron_ext.testing.rehearsing.rehearsals import Rehearsed, rehearse
from tests.integration.rehearsal.rehearsal_flags import PLAIN, SHARDED, TP, needs_device

pytestmark = needs_device

LAYERS, WIDTH, LENGTH, RANKS = 4, 16, 64, 4


def _rehearse(rows: int, *more: str) -> Rehearsed:
    flags = PLAIN + TP + "--use-per-layer-embedding --per-layer-hidden-size 16 --per-layer-strategy identity "
    rehearsed = rehearse(
        "pretrain_gpt_per_layer.py", *flags.split(), "--vocab-size", str(rows - 1), *more, processes=2 * RANKS
    )
    assert rehearsed.error is None
    return rehearsed


def _sent_by_rows(rehearsed: Rehearsed) -> dict[str, int]:
    """Bytes that the last step sends for rows, by operation."""
    found: dict[str, int] = {}
    for (scope, call), total in rehearsed.activity.communication.items():
        if scope == rehearsed.step and "per_layer/sparse/" in call.place:
            found[call.operation] = found.get(call.operation, 0) + total.bytes
    return found


@pytest.mark.parametrize(("rows", "in_step"), [(100_000, RANKS * LENGTH), (100, 100)])
def test_a_step_reduces_as_many_rows_as_it_has_tokens_and_at_most_all(rows: int, in_step: int) -> None:
    sent = _sent_by_rows(_rehearse(rows, "--per-layer-sparse"))
    # The whole result of an all-gather is counted; ids have 8 bytes.
    assert sent == {
        "all-reduce": 4 * LAYERS * in_step * WIDTH // 2,
        "all-gather": 8 * RANKS * LENGTH,
    }


def test_ranks_of_the_distributed_optimizer_gather_their_shares_of_the_rows() -> None:
    sent = _sent_by_rows(_rehearse(100_000, "--per-layer-sparse", *SHARDED.split()))
    row = 4 * LAYERS * WIDTH // 2
    assert sent["all-gather"] == 8 * RANKS * LENGTH + RANKS * LENGTH * row


def test_memory_of_a_step_does_not_hold_a_gradient_of_the_table() -> None:
    whole, rows = _rehearse(100_000), _rehearse(100_000, "--per-layer-sparse")
    table = 4 * LAYERS * 100_000 * WIDTH // 2
    assert whole.peak.size - rows.peak.size == pytest.approx(table, rel=0.1)
