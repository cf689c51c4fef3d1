"""A report's file is checked before the work, and is whole or not there."""

from pathlib import Path

import pytest

from megatron_ext.reports.report_files import check_report_writable, write_report


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "page.html"
    check_report_writable("--html", path)
    assert not path.parent.exists(), "checking leaves nothing"
    write_report(path, "één")
    assert path.read_text(encoding="utf-8") == "één"
    assert [found.name for found in path.parent.iterdir()] == ["page.html"]


def test_what_cannot_be_written_is_told_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="--output .*file is a file, not a directory"):
        check_report_writable("--output", tmp_path / "file" / "x.json")
    with pytest.raises(IsADirectoryError, match="--output .*is a directory"):
        check_report_writable("--output", tmp_path)
