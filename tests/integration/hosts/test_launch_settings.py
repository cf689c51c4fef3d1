"""What the launcher reads from the environment: its own variables, then torchrun's, then a Slurm step's."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from megatron_ext.platform.hosts.endpoint_port import await_endpoint, hold_port
from megatron_ext.platform.hosts.host_addresses import Endpoint
from megatron_ext.platform.hosts.launch import rendezvous_options
from megatron_ext.platform.hosts.launch_settings import read_settings
from megatron_ext.platform.hosts.rendezvous import Place

STEP = {
    "SLURM_JOB_ID": "712345",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "node[01-03]",
}
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[01-03]" ] && printf 'node01\\nnode02\\nnode03\\n'
"""


def test_without_variables_a_run_is_on_this_host_only() -> None:
    settings = read_settings({})
    assert (settings.nodes, settings.endpoint, settings.run_id) == ("1", None, "per-layer")


def test_our_variables_have_precedence_over_torchruns() -> None:
    torchruns = {
        "PET_NNODES": "4",
        "PET_RDZV_ENDPOINT": "b:2",
        "PET_NPROC_PER_NODE": "gpu",
        "PET_RDZV_ID": "x",
    }
    settings = read_settings(torchruns)
    assert (settings.nodes, settings.processes, settings.run_id) == ("4", "gpu", "x")
    assert settings.endpoint == Endpoint("PET_RDZV_ENDPOINT", "b:2")
    ours = {"NNODES": "2", "RDZV_ENDPOINT": "a:1", "NPROC_PER_NODE": "8", "RDZV_ID": "y", "RDZV_WAIT": ""}
    settings = read_settings({**torchruns, **ours})
    assert (settings.nodes, settings.processes, settings.run_id, settings.wait) == ("2", "8", "y", 30)
    assert settings.endpoint == Endpoint("RDZV_ENDPOINT", "a:1")


def test_in_a_slurm_step_the_first_host_of_the_step_is_the_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    settings = read_settings(STEP)
    assert (settings.nodes, settings.run_id) == ("3", "712345")
    assert settings.hosts == ("node01", "node02", "node03")
    assert settings.endpoint is not None and settings.endpoint.text == "node01:22345"


def test_in_a_batch_script_or_a_step_of_one_host_a_run_is_on_this_host_only() -> None:
    assert read_settings({"SLURM_JOB_ID": "7", "SLURM_NNODES": "3", "SLURM_NODEID": "0"}).endpoint is None
    assert read_settings({**STEP, "SLURM_STEP_NUM_NODES": "1"}).nodes == "1"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2"}, "NNODES=2: requires RDZV_ENDPOINT=HOST:PORT"),
        ({"NNODES": "two"}, "NNODES=two: must be a number of hosts"),
        ({"NNODES": "3:2"}, "NNODES=3:2: must be a number of hosts, or MIN:MAX"),
        ({"RDZV_WAIT": "soon"}, "RDZV_WAIT=soon: must be a number of seconds"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "24"}, "use srun --ntasks-per-node=1"),
    ],
)
def test_a_wrong_variable_is_named(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(variables)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("host0", "host0", 29400),
        ("host0:1234", "host0", 1234),
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("fe80::1", "fe80::1", 29400),
        ("[fe80::1]", "fe80::1", 29400),
        ("[fe80::1]:81", "fe80::1", 81),
    ],
)
def test_an_endpoint_is_read_as_torchrun_reads_it(text: str, host: str, port: int) -> None:
    endpoint = Endpoint("RDZV_ENDPOINT", text)
    assert (endpoint.host, endpoint.port) == (host, port)


@pytest.mark.parametrize("text", [":1", "host:0", "host:70000", "host:x", "host:"])
def test_a_malformed_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be HOST:PORT"):
        _ = Endpoint("RDZV_ENDPOINT", text).port


def test_torchruns_own_variables_for_the_rendezvous_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings({"NNODES": "2", "RDZV_ENDPOINT": "a:1", "RDZV_JOIN_TIMEOUT": "9"})
    place = Place(is_host=True, address="10.0.0.1", interface="eth1")
    options = rendezvous_options(settings, place)
    assert options[-3:] == ["join_timeout=9,is_host=true", "--local-addr", "10.0.0.1"]
    monkeypatch.setenv("PET_RDZV_CONF", "join_timeout=7,read_timeout=5")
    monkeypatch.setenv("PET_LOCAL_ADDR", "10.0.0.7")
    assert rendezvous_options(settings, place)[-1] == "join_timeout=7,read_timeout=5,is_host=true"


def _answer(server: socket.socket, line: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(64)
        connection.sendall(line)


def test_another_service_at_the_endpoint_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        service = threading.Thread(target=_answer, args=(server, b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        service.start()
        endpoint = Endpoint("RDZV_ENDPOINT", f"127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(OSError, match=r"another service answers there \(with b'HTTP'\), not a launcher"):
            await_endpoint(endpoint, 30, print)
        assert time.monotonic() - started < 5
        service.join()


def test_a_service_that_accepts_connections_and_never_answers_is_refused_in_time() -> None:
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        started = time.monotonic()
        error = rf"RDZV_ENDPOINT=127.0.0.1:{port}: cannot be reached .* within 4 s \(RDZV_WAIT\): 127.0.0.1 port {port}"
        with pytest.raises(OSError, match=error + " accepts connections, but does not answer"):
            await_endpoint(Endpoint("RDZV_ENDPOINT", f"127.0.0.1:{port}"), 4, lines.append)
        assert time.monotonic() - started < 8
    assert len(lines) == 1
    assert lines[0].startswith("waiting up to 4 s")


def test_a_launcher_that_holds_the_port_answers_and_then_gives_it_to_the_store_of_torch() -> None:
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = Endpoint("RDZV_ENDPOINT", f"127.0.0.1:{free.getsockname()[1]}")
    held = hold_port(endpoint)
    assert held is not None
    assert hold_port(endpoint) is None
    started = time.monotonic()
    await_endpoint(endpoint, 30, lines.append)
    # A client of the store that comes before the store is there, as on a host whose torch starts sooner.
    with ThreadPoolExecutor() as pool:
        early = pool.submit(_store, endpoint.port, is_master=False)
        time.sleep(0.2)
        held.close()
        store = _store(endpoint.port, is_master=True)
        await_endpoint(endpoint, 30, lines.append)
        assert time.monotonic() - started < 10, "both answer the ping"
        store.set("key", "value")
        assert early.result(timeout=20).get("key") == b"value"
    assert lines == []


def _store(port: int, *, is_master: bool) -> TCPStore:
    return TCPStore(
        "127.0.0.1", port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
