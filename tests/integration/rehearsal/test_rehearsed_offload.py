"""A rehearsal of tables off the device (--per-layer-offload): only the rows of a step are on the device and travel."""

import pytest

from megatron_ext.testing.rehearsing.rehearsals import Rehearsed, rehearse
from tests.integration.rehearsal.rehearsal_flags import PLAIN, TP, needs_device

pytestmark = needs_device

LAYERS, COLUMNS, LENGTH, RANKS, ROWS = 4, 8, 64, 4, 100_000
TABLES = 4 * LAYERS * ROWS * COLUMNS


def _rehearse(*more: str) -> Rehearsed:
    flags = PLAIN + TP + "--use-per-layer-embedding --per-layer-hidden-size 16 --per-layer-strategy identity "
    flags += "--per-layer-sparse --log-per-layer-stats --vocab-size "
    rehearsed = rehearse(
        "pretrain_gpt_per_layer.py", *flags.split(), str(ROWS - 1), *more, processes=2 * RANKS
    )
    assert rehearsed.error is None
    return rehearsed


def _moved(rehearsed: Rehearsed) -> dict[str, int]:
    """Bytes that the last step copies between host and device for tables, by direction."""
    found: dict[str, int] = {}
    for (scope, direction, place), total in rehearsed.activity.copies.items():
        if scope == rehearsed.step and "table_memory" in place:
            found[direction] = found.get(direction, 0) + total.bytes
    return found


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_tables_and_state_are_not_on_the_device_and_a_step_moves_its_rows(kind: str) -> None:
    on_device, off = _rehearse(), _rehearse("--per-layer-offload", kind)
    assert on_device.peak.size - off.peak.size == pytest.approx(3 * TABLES, rel=0.05)
    rows, ids = 4 * LAYERS * RANKS * LENGTH * COLUMNS, 8 * RANKS * LENGTH
    # Weights and two moments; their places are asked for before each is copied.
    assert _moved(off) == {"to device": 3 * rows, "to host": 3 * rows + 6 * ids}
    assert _moved(on_device) == {}
