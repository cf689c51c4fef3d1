"""The printed tables of the comparison fit a line, and leave no value out."""

import pytest

from megatron_ext.progressive.report.comparison_page import Cell, Table
from megatron_ext.progressive.report.printed_tables import print_table

NAMES = [f"figure {number} of the last phase" for number in range(12)]


def _printed(table: Table, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_table(table)
    return capsys.readouterr().out.splitlines()


def test_a_wide_table_is_printed_in_100_columns_with_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[list[Cell]] = [
        ["append", "stack 0", *range(1000, 1012)],
        ["end_to_end", "joint", *range(2000, 2012)],
    ]
    lines = _printed(Table(title="Phases", columns=["run", "phase", *NAMES], rows=rows), capsys)
    assert max(map(len, lines)) <= 100
    assert all(f"{first + number:,}" in "\n".join(lines) for first in (1000, 2000) for number in range(12))
    values = [line for line in lines if "1,0" in line]
    assert len(values) == 3 and all(line.startswith("│ append     │ stack 0 │") for line in values)
    assert sum(line.startswith("┃") for line in lines) <= 3 * 3, "a header has at most three lines"


def test_a_column_with_one_value_is_stated_once_above_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[list[Cell]] = [["a", 6, 491520, 5.5], ["b", 6, 491520, 5.25]]
    lines = _printed(Table(title="Runs", columns=["run", "layers", "tokens", "loss"], rows=rows), capsys)
    assert lines[0] == "Runs, the same in all rows: layers 6, tokens 491,520"
    assert not any("491,520" in line or "layers" in line for line in lines[1:])


def test_a_table_of_one_row_keeps_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(Table(title="Runs", columns=["run", "layers"], rows=[["a", 6]]), capsys)
    assert "same" not in lines[0] and "│ a   │      6 │" in lines


def test_rows_that_differ_only_in_their_names_are_still_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(Table(title="Runs", columns=["run", "layers"], rows=[["a", 6], ["b", 6]]), capsys)
    assert lines[0].endswith("layers 6") and {"│ a   │", "│ b   │"} <= set(lines)
