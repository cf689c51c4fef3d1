"""Which steps the table of tools/training_summary.py shows."""

import pytest

from tools.training_summary import pick


@pytest.mark.parametrize(
    ("last", "evaluated", "expected"),
    [
        (100, [50, 100], [1, 25, 50, 75, 100]),
        (200, [50, 100, 150, 200], [1, 25, 50, 75, 100, 125, 150, 175, 200]),
        (137, [50, 100, 137], [1, 25, 50, 75, 100, 125, 137]),
        (1000, list(range(100, 1001, 100)), [1, 200, 400, 600, 800, 1000]),
        (90, [], [1, *range(10, 91, 10)]),
        (5, [], [1, 2, 3, 4, 5]),
        (1, [], [1]),
        (160, [7, 14], [1, 7, 14, 25, 50, 75, 100, 125, 150, 160]),
    ],
)
def test_the_rows_are_the_ends_the_evaluated_steps_and_round_even_steps(
    last: int, evaluated: list[int], expected: list[int]
) -> None:
    assert pick(list(range(1, last + 1)), evaluated, 10) == expected


def test_a_table_of_two_rows_shows_both_ends() -> None:
    assert pick(list(range(20, 401, 20)), [200, 400], 2) == [20, 400]
