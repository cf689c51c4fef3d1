"""How numbers are shown."""

import pytest

from megatron_ext.training.logging.progress_line import binary_size, clock, compact


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (7.25, "7.25"),
        (999.4, "999"),
        (999.9, "1k"),
        (12345, "12.3k"),
        (1.746e11, "175G"),
        (-2e6, "-2M"),
        (3.14e23, "314Z"),
    ],
)
def test_compact_keeps_three_digits(number: float, text: str) -> None:
    assert compact(number) == text


def test_times_and_sizes_have_their_units() -> None:
    assert clock(3723.4) == "1:02:03"
    assert clock(90000) == "1 day, 1:00:00"
    assert binary_size(3 * 2**29) == "1.50 GiB"
    assert binary_size(2**30 / 10) == "0.10 GiB"
    assert binary_size(2**30 / 11) == "93.09 MiB"
    assert binary_size(2**11) == "2.00 KiB"
    assert binary_size(2**40 / 5) == "204.80 GiB"
    assert binary_size(5e12) == "4.55 TiB"
    assert binary_size(0) == "0 B"
