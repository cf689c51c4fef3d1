"""The corpus of Debian manuals: text without mark-up, equal pages once, and other pages in the held-out file."""

import json
import os
from pathlib import Path

import pytest

from megatron_ext.testing.forked_scripts import run_script

SCRIPT = "examples/gpt_per_layer/documentation_corpus.py"
PAGE = """<html><head><title>no text</title><style>p {{ color: red }}</style></head><body>
<nav><a href="x">Home</a></nav><h1>Page {number}</h1>
<p>if a &lt; b &amp;&amp; c:<br/>return <code>d</code></p></body></html>"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `dpkg` that lists its pages as those of one package; the others have none."""
    pages = tmp_path / "doc"
    pages.mkdir()
    for number in range(2400):
        (pages / f"{number}.html").write_text(PAGE.format(number=number // 2), encoding="utf-8")
    (pages / "other.txt").write_text("no page")
    command = tmp_path / "bin" / "dpkg"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n[ $2 != git-doc ] || ls -d {pages}/* {pages}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return tmp_path


def test_pages_become_text_once_each_in_one_of_both_files(installed: Path) -> None:
    files = [installed / "train.jsonl", installed / "held_out.jsonl"]
    result = run_script(SCRIPT, "--output", str(files[0]), "--held-out", str(files[1]))
    assert result.returncode == 0, result.stderr
    train, held_out = ([json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files)
    assert 0 < len(held_out) < 60
    expected = {f"Page {number}\n\nif a < b && c:\nreturn d" for number in range(1200)}
    assert len(train) + len(held_out) == 1200
    assert {*train, *held_out} == expected


def test_a_package_that_is_not_installed_is_named(installed: Path) -> None:
    (installed / "bin" / "dpkg").write_text("#!/bin/sh\nexit 1\n")
    result = run_script(SCRIPT, "--output", str(installed / "a"), "--held-out", str(installed / "b"))
    assert result.returncode != 0
    assert result.stderr.strip() == (
        "error: package cppreference-doc-en-html: not installed; run apt-get install cppreference-doc-en-html"
    )
