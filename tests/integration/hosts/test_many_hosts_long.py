"""What takes minutes on several hosts: four of them, a slow link, a restart by torchrun, a rank that hangs.

    MANY_HOSTS=all pytest -q -s tests/integration/hosts/test_many_hosts_long.py

Skipped without that variable. -s prints the launchers' output, which docs/many_hosts.md shows.
"""

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ext.testing.forked_scripts import run_script
from tests.integration.hosts import host_runs as runs
from tests.integration.hosts.network_hosts import Started, network, reason_without_hosts
from tests.integration.npt.npt_run_helpers import write_data

_REASON = (
    reason_without_hosts()
    if os.environ.get("MANY_HOSTS") == "all"
    else "takes minutes; MANY_HOSTS=all runs it"
)
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

SCRIPT = "pretrain_gpt_per_layer.py"
TENSOR = ["--tensor-model-parallel-size", "2"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def finish(started: Sequence[Started], seconds: float = 240.0) -> list[int]:
    """Exit codes of the launchers, whose output is printed."""
    codes = [one.wait(seconds) for one in started]
    print(runs.all_output(started))
    return codes


@pytest.mark.parametrize("layout", [TENSOR, [*TENSOR, *PIPELINE]], ids=["TP2 x DP4", "TP2 x PP2 x DP2"])
def test_four_hosts_train_as_one_host_does(data: str, tmp_path: Path, layout: list[str]) -> None:
    more = [*layout, "--train-iters", "6"]
    with network(4) as hosts:
        command = [SCRIPT, *runs.flags(data, tmp_path / "four", *more)]
        started = runs.launch(hosts, tmp_path, command, processes=2)
        assert finish(started) == [0] * 4
    alone = run_script(SCRIPT, *runs.flags(data, tmp_path / "one", *more), processes=8)
    assert alone.returncode == 0, alone.stderr
    assert runs.steps(started[0].output()) == runs.steps(alone.stdout) and "step 6/6" in alone.stdout


def test_a_slow_link_makes_steps_longer_and_changes_no_loss(data: str, tmp_path: Path) -> None:
    outputs = []
    for name in ("fast", "slow"):
        with network(2) as hosts:
            if name == "slow":
                print(*(f"{host.name}: {host.delay()}" for host in hosts))
            wide = ["--hidden-size", "256", "--train-iters", "5"]
            command = [SCRIPT, *runs.flags(data, tmp_path / name, *TENSOR, *wide)]
            started = runs.launch(hosts, tmp_path, command, processes=2)
            assert finish(started) == [0, 0]
            outputs.append(started[0].output())
    fast, slow = outputs
    assert runs.steps(fast) == runs.steps(slow) and "step 5/5" in fast
    times = [[float(found) for found in re.findall(r"ms/step ([0-9.]+)", text)][1:] for text in outputs]
    assert min(times[1]) > 2 * min(times[0]), times


def test_max_restarts_starts_all_processes_again_from_the_last_checkpoint(data: str, tmp_path: Path) -> None:
    lasting = ["--train-iters", "200", "--save-interval", "20"]
    with network(2) as hosts:
        command = ["--max-restarts", "1", SCRIPT]
        command += runs.flags(data, tmp_path / "save", *TENSOR, *PIPELINE, *lasting)
        started = runs.launch(hosts, tmp_path, command, processes=2)
        runs.wait_for(lambda: 30 in runs.steps(started[0].output()), started)
        before = {rank: process.pid for host in hosts for rank, process in host.ranks().items()}
        os.kill(before[3], signal.SIGKILL)
        runs.wait_for(lambda: len([rank for host in hosts for rank in host.ranks()]) < 4, started)
        runs.wait_for(lambda: len(re.findall(r"^step +30/", started[0].output(), re.MULTILINE)) == 2, started)
        after = {rank: process.pid for host in hosts for rank, process in host.ranks().items()}
        assert before.keys() == after.keys() == set(range(4))
        assert not set(before.values()) & set(after.values()), "every process is a new one"
        assert finish(started) == [0, 0]
    lines = [line for line in started[0].output().splitlines() if line.startswith("step ")]
    numbers = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert numbers[-1] == 200 and numbers.count(21) == 2 and numbers.count(20) == 1


def _hang(data: str, folder: Path, rank: int, *, cut: bool) -> tuple[list[Started], list[int], float]:
    """A run of two hosts in which a rank is stopped, or the second host is cut off: launchers, codes, seconds."""
    with network(2) as hosts:
        command = [SCRIPT, *runs.flags(data, folder / "save", *TENSOR, *PIPELINE, "--train-iters", "100000")]
        started = runs.launch(hosts, folder, command, processes=2)
        runs.wait_for(lambda: 20 in runs.steps(started[0].output()), started)
        begin = time.monotonic()
        if cut:
            hosts[1].cut_off()
        else:
            hosts[1].ranks()[rank].send_signal(signal.SIGSTOP)
        codes = finish(started[:1])
        seconds = time.monotonic() - begin
        if not cut:
            codes += finish(started[1:])
        return started, codes, seconds


def test_a_rank_that_hangs_is_named_and_the_run_ends_within_the_timeout(data: str, tmp_path: Path) -> None:
    started, codes, seconds = _hang(data, tmp_path, 3, cut=False)
    assert codes == [1, 1] and seconds < 120
    text = runs.all_output(started)
    named = r"rank 3 \(host2, process \d+\) has (not reached|stopped in) step \d+: it gives no sign of life"
    assert re.search(rf"^warning: no progress for \d+ s: {named}$", text, re.MULTILINE)
    ended = rf"^error: rank \d waited 1 minutes \(--distributed-timeout-minutes\) for another rank: {named}$"
    assert re.search(ended, text, re.MULTILINE)
    assert "Traceback" not in started[0].output()


def test_a_host_that_is_cut_off_is_named_and_the_others_end_within_the_timeout(
    data: str, tmp_path: Path
) -> None:
    started, codes, seconds = _hang(data, tmp_path, 3, cut=True)
    assert codes == [1] and seconds < 120
    text = started[0].output()
    assert re.search(r"^warning: no progress .*rank [23] \(host2, .* no sign of life", text, re.MULTILINE)
    assert runs.error_lines(text) and "Traceback" not in text
