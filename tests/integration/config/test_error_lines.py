"""How entry points end, alone and under the real torchrun: what the user has to know is the last thing printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config.command_line.error_lines import run_main, tell_launcher
from megatron_ext.testing.torchrun import environment

SCRIPT = """
import os, sys, time
from megatron_ext.config.command_line.error_lines import ProcessLost, run_main

def main():
    kind, rank = sys.argv[1], os.environ.get("RANK", "0")
    if kind == "mistake":
        if "RANK" in os.environ and rank == "0":
            time.sleep(0.5)  # the rank that prints is the last to find the mistake
        raise ValueError("--flag 3: must\\nbe 4")
    if kind == "defect":
        raise KeyError("a defect")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "loader":
        raise ProcessLost("a helper died")
    if rank == "1":
        time.sleep(0.5)
        raise ValueError("--flag 3: only rank 1 knows")
    raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4000")

if __name__ == "__main__":
    run_main(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A script that ends in every way."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return str(path)


ALONE = {
    "mistake": (2, "error: --flag 3: must be 4"),
    "interrupt": (130, "error: interrupted"),
    "loader": (1, "error: a helper died"),
    "peer": (
        1,
        "error: rank 0 stops because another process of the run failed or was killed; see the output",
    ),
    "defect": (1, "KeyError: 'a defect'"),
}


@pytest.mark.parametrize("kind", ALONE)
def test_each_way_to_end_has_its_exit_code_and_all_but_defects_are_one_line(kind: str, script: str) -> None:
    result = subprocess.run(
        [sys.executable, script, kind], env=environment(), capture_output=True, text=True, timeout=60
    )
    code, told = ALONE[kind]
    lines = result.stderr.splitlines()
    assert result.returncode == code and lines[-1].startswith(told), result.stderr
    assert (len(lines) == 1) == (kind != "defect")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("mistake", "traceback : error: --flag 3: must be 4"),
        ("defect", "KeyError: 'a defect'"),
        ("peer", "traceback : error: --flag 3: only rank 1 knows"),
    ],
)
def test_torchruns_report_ends_with_the_error_of_the_process_that_failed_first(
    kind: str, told: str, script: str
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, script, kind], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    *_, reason, rule = result.stderr.rstrip().splitlines()
    while not reason.strip():  # a traceback ends with an empty line
        reason, rule = result.stderr.rstrip().splitlines()[-3:-1]
    assert set(rule) <= {"=", " "} and reason.strip() == told, result.stderr
    assert "Connection closed by peer" not in result.stderr
    if kind == "mistake":
        assert result.stderr.splitlines().count("error: --flag 3: must be 4") == 1, "printed by rank 0"


def test_the_first_reason_counts_and_none_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    tell_launcher("stopped after step 3")
    with pytest.raises(SystemExit) as end:
        run_main(lambda: 143)
    assert end.value.code == 143
    assert json.loads(path.read_text())["message"]["message"] == "stopped after step 3"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    tell_launcher("nobody listens")
