"""Runs on several hosts, which are network namespaces with their own addresses; started as docs/parallelism.md says."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_ext.testing.checkpoint_runs import read_plain
from megatron_ext.testing.forked_scripts import run_script
from megatron_ext.testing.run_single import run_single
from megatron_ext.testing.warm_python.warm_server import warm_variables
from tests.integration.hosts import host_runs as runs
from tests.integration.hosts.network_hosts import Host, Started, network, reason_without_hosts
from tests.integration.npt.npt_run_helpers import write_data

_REASON = reason_without_hosts()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

SCRIPT = "pretrain_gpt_per_layer.py"
TENSOR_AND_PIPELINE = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
STEPS, INTERVAL = 24, 4


@pytest.fixture
def two_hosts() -> Iterator[list[Host]]:
    with network(2) as hosts:
        yield hosts


@dataclass
class Outcome:
    """A run of two hosts, of which the second joins late and dies; and the same command once more."""

    save: Path
    data: str
    died: Started
    survived: Started
    code: int
    seconds: float
    """From the death of the second host to the end of the first one's launcher."""

    restarted: list[Started]
    codes: list[int]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("hosts")
    data, save = write_data(folder), folder / "save"
    lasting = ["--train-iters", str(STEPS), "--save-interval", str(INTERVAL)]
    command = [SCRIPT, *runs.flags(data, save, *TENSOR_AND_PIPELINE, *lasting)]
    with network(2) as hosts:
        first = runs.launch_on(hosts[0], hosts, folder, command, processes=2, **warm_variables())
        runs.wait_for(lambda: "hosts the rendezvous" in first.output(), [first])
        time.sleep(3)
        second = runs.launch_on(hosts[1], hosts, folder, command, processes=2, **warm_variables())
        # The last stage's losses are printed by rank 0, which is on the first host.
        runs.wait_for(lambda: "saved step 8 " in first.output(), [first, second])
        dying = time.monotonic()
        hosts[1].die()
        code = first.wait(60)
        seconds = time.monotonic() - dying
        restarted = runs.launch(hosts, folder, command, processes=2, **warm_variables())
        codes = [one.wait(150) for one in restarted]
        return Outcome(save, data, second, first, code, seconds, restarted, codes)


def test_a_first_host_with_two_networks_hosts_the_rendezvous_at_its_second_address(outcome: Outcome) -> None:
    first, second = outcome.restarted
    assert "host host1, 10.77.2.1 on eth1, hosts the rendezvous" in first.output()
    assert "host host2, 10.77.2.2 on eth1, joins the rendezvous" in second.output()


def test_when_a_host_dies_the_others_end_soon_with_one_line(outcome: Outcome) -> None:
    text = outcome.survived.output()
    assert outcome.code == 1 and outcome.seconds < 30
    assert "Traceback" not in text
    last = runs.error_lines(text)[-1]
    assert last.startswith("error: rank ") and "on host host1 ended with exit code 1" in last
    assert "exit code 1: rank " in last and " stops because another process of the run on 10.77.2." in last


def test_the_same_command_resumes_from_the_last_checkpoint(outcome: Outcome) -> None:
    assert outcome.codes == [0, 0], runs.all_output(outcome.restarted)
    done = runs.steps(outcome.restarted[0].output())
    assert set(done) in ({*range(first, STEPS + 1)} for first in range(9, STEPS, INTERVAL))


def test_losses_and_weights_over_two_hosts_are_those_of_the_same_layout_on_one(
    outcome: Outcome, tmp_path: Path
) -> None:
    flags = runs.flags(outcome.data, tmp_path / "save", *TENSOR_AND_PIPELINE, "--train-iters", str(STEPS))
    alone = run_script(SCRIPT, *flags, processes=4)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    over_hosts = runs.steps(outcome.survived.output()) | runs.steps(outcome.restarted[0].output())
    assert over_hosts == runs.steps(alone.stdout) and len(over_hosts) == STEPS
    run_single(
        _assert_same_weights, *(f"{path}/iter_{STEPS:07}" for path in (outcome.save, tmp_path / "save"))
    )


def _assert_same_weights(one: str, other: str) -> None:
    first, second = read_plain(one), read_plain(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, msg=name)


def test_an_endpoint_that_cannot_be_reached_ends_every_host_within_seconds_with_one_line(
    two_hosts: list[Host], tmp_path: Path
) -> None:
    _, second = two_hosts
    wrong = {
        "10.77.2.9:29400": "cannot be reached from host host2 within 4 s (RDZV_WAIT): 10.77.2.9 port 29400: ",
        "10.77.2.1:1": "cannot be reached from host host2 within 4 s (RDZV_WAIT): 10.77.2.1 port 1: connection refused",
        "10.99.0.1:29400": "host host2 has no route to 10.99.0.1; the host's addresses are 10.77.2.2, 127.0.0.1, ",
        "nowhere.invalid:29400": "the name nowhere.invalid does not resolve on host host2",
        "10.77.2.1:port": "must be HOST:PORT, with a port from 1 to 65535",
    }
    started_at = time.monotonic()
    started = {
        endpoint: second.launch(
            tmp_path / f"{number}.log",
            *runs.LAUNCHER,
            SCRIPT,
            NNODES="2",
            RDZV_ENDPOINT=endpoint,
            RDZV_WAIT="4",
        )
        for number, endpoint in enumerate(wrong)
    }
    codes = {endpoint: launcher.wait(30) for endpoint, launcher in started.items()}
    assert time.monotonic() - started_at < 15
    assert codes == dict.fromkeys(wrong, 2)
    for endpoint, reason in wrong.items():
        (line,) = runs.error_lines(started[endpoint].output())
        assert line.startswith(f"error: RDZV_ENDPOINT={endpoint}: ") and reason in line
        assert "Traceback" not in started[endpoint].output()


def test_a_host_that_never_joins_is_reported_with_those_that_have(
    two_hosts: list[Host], tmp_path: Path
) -> None:
    limits = {"NNODES": "3", "NPROC_PER_NODE": "1", "RDZV_JOIN_TIMEOUT": "8"}
    started = [
        host.launch(
            tmp_path / f"{host.name}.log", *runs.LAUNCHER, SCRIPT, RDZV_ENDPOINT="10.77.2.1:29400", **limits
        )
        for host in two_hosts
    ]
    assert [one.wait(90) for one in started] == [1, 1]
    first, second = (runs.error_lines(one.output()) for one in started)
    assert first == [
        "error: RDZV_ENDPOINT=10.77.2.1:29400: not all of NNODES=3 hosts joined within 8 s (RDZV_JOIN_TIMEOUT): "
        "2 of 3 hosts have joined (10.77.2.1, 10.77.2.2)"
    ]
    # It gives up a moment before the first host or after it.
    assert len(second) == 1 and "the host of the rendezvous" in second[0]
    assert "Traceback" not in runs.all_output(started)


def test_the_tasks_of_a_slurm_step_find_the_interface_that_leads_to_the_first_host(
    two_hosts: list[Host], tmp_path: Path
) -> None:
    data, save = write_data(tmp_path), tmp_path / "save"
    module = [sys.executable, "-m", "megatron_ext.platform.hosts.slurm_task"]
    command = [*module, SCRIPT, *runs.flags(data, save, "--train-iters", "2")]
    place = {"MASTER_ADDR": two_hosts[0].address, "MASTER_PORT": str(runs.PORT), "WORLD_SIZE": "2"}
    started = [
        host.launch(tmp_path / host.name, *command, SLURM_PROCID=str(rank), SLURM_LOCALID="0", **place)
        for rank, host in enumerate(two_hosts)
    ]
    assert [one.wait(150) for one in started] == [0, 0], runs.all_output(started)
    assert runs.steps(started[0].output()).keys() == {1, 2}


def test_a_slurm_task_without_a_route_to_the_first_host_ends_with_one_line(
    two_hosts: list[Host], tmp_path: Path
) -> None:
    module = [sys.executable, "-m", "megatron_ext.platform.hosts.slurm_task", "script.py"]
    place = {"MASTER_ADDR": "10.99.1.1", "MASTER_PORT": "29400", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    started = two_hosts[1].launch(tmp_path / "log", *module, **place)
    assert started.wait(60) == 2
    assert started.output().startswith(
        "error: MASTER_ADDR:MASTER_PORT=10.99.1.1:29400: host host2 has no route to"
    )
