"""tools/progressive_report.py prints, writes and refuses what it should."""

import json
import sys
from pathlib import Path

import pytest

from megatron_ext.config.command_line.error_lines import main_guard
from tests.unit.progressive.report_helpers import write_grown, write_whole
from tools.progressive_report import main


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    main_guard(main)()


def test_tables_json_and_page_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [f"grown={write_grown(tmp_path / 'g')}", f"whole={write_whole(tmp_path / 'w')}"]
    figures, page = tmp_path / "new" / "figures.json", tmp_path / "page.html"
    _run(monkeypatch, "--runs", *runs, "--reference", "whole", "--html", page, "--output", figures)
    content = json.loads(figures.read_text())
    assert content["equal_seconds"] == 10
    assert [run["name"] for run in content["runs"]] == ["grown", "whole"]
    assert content["runs"][0]["phases"][1]["stack_treatments"] == ["frozen", "trained"]
    assert "Growth: whole" in page.read_text()
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("0.25", "end to end", "2.25", "written: "))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runs", "{tmp}/g"], "--runs {tmp}/g: must be NAME=DIR"),
        (["--runs", "a={tmp}/g", "a={tmp}/g"], "the name a is given twice"),
        (["--runs", "a={tmp}/none"], "--runs a={tmp}/none: contains no progressive.json"),
        (["--runs", "a={tmp}/g", "--reference", "b"], "--reference b: must be one of the --runs a"),
        (["--runs", "a={tmp}/g", "--output", "{tmp}"], "--output"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_grown(tmp_path / "g")
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, *(text.format(tmp=tmp_path) for text in arguments), "--html", page)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words.format(tmp=tmp_path) in lines[0]
    assert not page.exists()
