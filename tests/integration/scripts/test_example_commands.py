"""The commands that the example scripts print: each can be pasted, fits a line, and has no flag twice.

PYTHON is a program that only writes down its arguments, so that a script runs through in a second.
"""

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "examples").rglob("*.sh")
    if "examples/common.sh" in path.read_text()
    and path.name != "main_job.sh"  # its commands read each other's files
)
RECORDER = """#!{python}
import json, sys
with open("{log}", "a") as log:
    print(json.dumps(sys.argv), file=log)
"""


def _commands(printed: str) -> list[list[str]]:
    """The words of the printed commands; a line that ends with a backslash continues."""
    joined = printed.replace(" \\\n", " ")
    words = [shlex.split(line[2:]) for line in joined.splitlines() if line.startswith("$ ")]
    return [command[: command.index(">")] if ">" in command else command for command in words]


def _bash(script: str, tmp_path: Path) -> tuple[str, list[list[str]]]:
    """What the script prints, and the commands that it runs."""
    recorder, log = tmp_path / "python", tmp_path / "log"
    recorder.write_text(RECORDER.format(python=sys.executable, log=log))
    recorder.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(recorder), "QUICKSTART": str(tmp_path), "MODEL": "model"}
    ended = subprocess.run(
        ["bash", str(ROOT / script), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, [json.loads(line) for line in log.read_text().splitlines()]


def test_the_scripts_are_found() -> None:
    assert {"examples/quickstart.sh", "examples/progressive/quickstart.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_printed_command_is_the_one_that_runs_and_has_no_flag_twice(script: str, tmp_path: Path) -> None:
    printed, run = _bash(script, tmp_path)
    commands = _commands(printed)
    assert len(commands) > 5
    assert commands == run
    for command in commands:
        flags = Counter(word.split("=")[0] for word in command if word.startswith("--"))
        assert not [flag for flag, count in flags.items() if count > 1], shlex.join(command)


def test_a_long_command_is_printed_in_lines_that_bash_reads_as_the_same_words() -> None:
    words = ["show", "-m", "tool", "--prompt", 'it\'s a \\ "$test"', "--empty", "", "--split", "97,2,1"]
    words += [f"--flag-{number}=1" if number % 3 else f"--flag-{number}" for number in range(40)]
    words += ["--values", *(str(number) * 8 for number in range(20))]
    printed = _in_bash('. examples/common.sh; print_command "$@"', "test", *words)
    command = printed[printed.index("$ show") + 2 :]
    lines = command.splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 110
    assert any("--values 00000000" in line for line in lines), "a flag stays with its value"
    pasted = _in_bash(f"show() {{ printf '%s\\n' show \"$@\"; }}\n{command}")
    assert pasted.splitlines() == words


def _in_bash(script: str, *arguments: str) -> str:
    return subprocess.run(
        ["bash", "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
