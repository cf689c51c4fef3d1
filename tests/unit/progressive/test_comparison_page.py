"""The report of progressive trainings: what its tables leave out, and where its timeline draws a stack."""

import base64
import re
from dataclasses import replace
from pathlib import Path

from megatron_ext.progressive.report.comparison_figures import compare_runs
from megatron_ext.progressive.report.comparison_page import (
    growth_blocks,
    phases_table,
    report_page,
    runs_table,
)
from megatron_ext.progressive.report.training_results import read_run
from tests.unit.progressive.report_helpers import of_before, write_grown, write_whole


def test_a_prepended_stack_shifts_the_earlier_ones_up(tmp_path: Path) -> None:
    blocks = growth_blocks(read_run("grown", write_grown(tmp_path)))
    drawn = [(block.labels[0], block.begin, block.end, block.rows, block.kind.name) for block in blocks]
    assert drawn == [
        ("stack 0, full", 0, 4, range(2), "trained"),
        ("stack 1, bfloat16", 4, 8, range(2), "trained"),
        ("stack 0, full", 4, 8, range(2, 4), "frozen"),
    ]


def test_stacks_of_which_nothing_was_noted_are_drawn_as_such(tmp_path: Path) -> None:
    run = read_run("grown", write_grown(tmp_path))
    blocks = growth_blocks(replace(run, phases=tuple(map(of_before, run.phases))))
    assert {block.kind.name for block in blocks} == {"not recorded"}
    assert blocks[1].labels[0] == "stack 1, bfloat16"


def test_columns_that_no_run_has_are_left_out(tmp_path: Path) -> None:
    runs = [read_run("grown", write_grown(tmp_path / "g")), read_run("whole", write_whole(tmp_path / "w"))]
    one, two = compare_runs(runs[1:]), compare_runs(runs, "whole")
    assert {"step / whole", "held-out loss", "tokens"} <= set(runs_table(two).columns)
    alone = runs_table(one).columns
    assert not [
        name for name in alone if "/" in name or "held-out" in name or "validation loss after" in name
    ]
    assert "from the cache, ms" not in phases_table(two).columns
    assert phases_table(two).rows[1][:4] == ["grown", "stack 1", 4, 4]


def test_the_page_shows_both_tables_and_every_runs_growth(tmp_path: Path) -> None:
    runs = [read_run("grown", write_grown(tmp_path / "g")), read_run("whole", write_whole(tmp_path / "w"))]
    page = report_page(runs, compare_runs(runs, "whole"))
    assert page.count("<table>") == 2
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", page)]
    assert len(pictures) == 2 * 3 + 2, "a timeline and two bar charts a run, two charts of all"
    assert all(
        f">{text}</text>" in pictures[0] for text in ("stack 0, full", "trained", "frozen", "validation")
    )
    assert ">end to end</text>" in pictures[3]
    assert all(f">{name}</text>" in pictures[6] for name in ("grown", "whole", "training time, s"))
    assert ">whole</text>" not in pictures[7], "it has not logged its tokens"
