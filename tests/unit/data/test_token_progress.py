"""The progress of the tools that read token ids: a bar on a terminal, lines in a log file."""

import contextlib
import os
import re
import sys

import pytest

from megatron_ext.data.files import console
from megatron_ext.data.files.console import token_progress

LINE = r"held: ([\d,]+) of 2,000 tokens \((\d+)%\)  [\d,]+ tokens/s  ETA \d+:\d\d:\d\d\n"


def test_a_log_file_gets_lines_with_count_share_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    with token_progress("held", 2000) as advance:
        for _ in range(2):
            advance(1000)
    printed = capsys.readouterr()
    assert re.fullmatch(LINE * 2, printed.err)
    assert re.findall(LINE, printed.err) == [("1,000", "50"), ("2,000", "100")]
    assert not printed.out


def test_a_run_with_a_line_ends_with_the_line_of_its_last_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    with token_progress("held", 2000) as advance:
        advance(500)
        monkeypatch.setattr(console, "_LINE_SECONDS", 10.0)
        advance(500)
        advance(1000)
    assert re.findall(LINE, capsys.readouterr().err) == [("500", "25"), ("2,000", "100")]


def test_a_short_run_and_a_process_that_is_not_to_speak_print_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with token_progress("held", 2000) as advance:
        advance(2000)
    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    with token_progress("held", 2000, shown=False) as advance:
        advance(2000)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, terminal = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with token_progress("held", 2000) as advance:
            advance(2000)
    shown = ""
    with contextlib.suppress(OSError):  # at the end of what the closed terminal has shown
        while part := os.read(reader, 1 << 16):
            shown += part.decode(errors="replace")
    os.close(reader)
    assert "held" in shown
    assert "━" in shown
