"""Prints a table of the comparison in lines of at most 100 characters, unless a single column needs more.

Columns with the same value in all rows are printed once above the table. If the other columns do not fit, they are
distributed over several tables, each of which begins with the columns that identify a row. No value is shortened.
"""

from textwrap import wrap
from typing import Literal

from rich.console import Console
from rich.table import Table as RichTable

from megatron_ext.progressive.report.comparison_page import Cell, Table

_KEYS = ("run", "phase")
"""Columns that identify a row."""

_HEADER_LINES = 3


def print_table(table: Table, width: int = 100) -> None:
    """Prints a table.

    Args:
        table: the table.
        width: largest number of characters in a line.
    """
    columns = {name: [_text(row[i]) for row in table.rows] for i, name in enumerate(table.columns)}
    equal = _equal_columns(columns)
    if equal:
        print(f"{table.title}, the same in all rows: {', '.join(f'{k} {v}' for k, v in equal.items())}")
    texts = {name for i, name in enumerate(table.columns) if any(isinstance(r[i], str) for r in table.rows)}
    left = [name for name in columns if name not in equal and name not in _KEYS]
    title = table.title
    while left or title == table.title:
        shown = [*(name for name in columns if name in _KEYS), *left[:1]]
        left = left[1:]
        while left and _width(columns, [*shown, left[0]]) <= width:
            shown.append(left.pop(0))
        _print({name: columns[name] for name in shown}, title, texts)
        title = f"{table.title} (continued)"


def _equal_columns(columns: dict[str, list[str]]) -> dict[str, str]:
    """Maps each column with the same value in all rows to this value; empty if there is only one row."""
    return {
        name: cells[0]
        for name, cells in columns.items()
        if name not in _KEYS and len(cells) > 1 and len(set(cells)) == 1
    }


def _width(columns: dict[str, list[str]], names: list[str]) -> int:
    # Every column has a space on both sides, and a line after it; one line is before the first column.
    return 1 + sum(_column_width(name, columns[name]) + 3 for name in names)


def _column_width(name: str, cells: list[str]) -> int:
    """Returns the width of the widest cell, or more if the column's name would take more than three lines."""
    width = max(map(len, [*name.split(), *cells]))
    while len(wrap(name, width)) > _HEADER_LINES:
        width += 1
    return width


def _print(columns: dict[str, list[str]], title: str, texts: set[str]) -> None:
    shown = RichTable(title=title)
    for name, cells in columns.items():
        # Without a width, rich would truncate numbers to fit the window.
        justify: Literal["left", "right"] = "left" if name in texts else "right"
        shown.add_column(name, justify=justify, width=_column_width(name, cells))
    for row in zip(*columns.values(), strict=True):
        shown.add_row(*row)
    Console(width=10_000).print(shown)


def _text(cell: Cell) -> str:
    if isinstance(cell, int):
        return f"{cell:,d}"
    return f"{cell:.4g}" if isinstance(cell, float) else cell or ""
