"""Starts a script on this host with `torchrun`, after finding the network addresses by which the hosts reach each
other.

    python -m megatron_ext.platform.hosts.launch [TORCHRUN'S OPTIONS] SCRIPT FLAGS ...

examples/multi_node/launch.sh calls it and lists the environment variables that it reads.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from megatron_ext.config.command_line.error_lines import ProcessLost, run_main
from megatron_ext.platform.hosts.endpoint_port import HeldPort, await_endpoint, hold_port
from megatron_ext.platform.hosts.host_addresses import Endpoint
from megatron_ext.platform.hosts.interfaces import take_interface
from megatron_ext.platform.hosts.launch_settings import LaunchSettings, read_settings
from megatron_ext.platform.hosts.rendezvous import JoinedHosts, Place, print_line

_LATER_SECONDS = 15
"""Seconds that the other hosts wait for missing hosts after the host of the store has given up."""

_FIRST_REPORT, _LATER_REPORTS = 10.0, 60.0
"""Seconds until the host of the rendezvous first reports missing hosts, and between later reports."""


def main() -> int:
    """Launches the command line's script; returns the exit code, which is 0 or 1 as with `torchrun`."""
    signal.signal(signal.SIGTERM, _stop)  # torch replaces this handler once the training processes run
    # Slurm sends the signal to every process of a step. The training processes save and end; this process waits for
    # them.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    settings = read_settings(os.environ)
    if settings.processes != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Without this setting, torch prints C++ stack traces as warnings when another host has ended.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if ":" in settings.nodes or os.environ.get("PET_MAX_RESTARTS") or _has_option("--max-restarts"):
        # Otherwise, restarted processes would use the same store again, and would find the addresses of ended
        # processes.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    options = ["--nnodes", settings.nodes, "--nproc-per-node", settings.processes]
    if settings.endpoint is None:
        return _run_torchrun([*options, "--standalone", *sys.argv[1:]])
    place, port = _take_place(settings, settings.endpoint)
    return _run_torchrun([*options, *rendezvous_options(settings, place), *sys.argv[1:]], settings, port)


def _has_option(name: str) -> bool:
    given = (argument.partition("=")[0].replace("_", "-") for argument in sys.argv[1:])
    return name in given


def _take_place(settings: LaunchSettings, endpoint: Endpoint) -> tuple[Place, HeldPort | None]:
    """Finds this host's role in the rendezvous; then waits for the endpoint, or holds the endpoint's port and returns
    it.
    """
    place = take_interface(endpoint)
    chosen = _given_configuration().get("is_host")
    if chosen is not None:
        place = replace(place, is_host=chosen.lower() in ("1", "true", "t", "yes", "y"))
    port = None if place.is_host is False else hold_port(endpoint)
    if place.is_host and port is None:
        place = replace(place, is_host=False)  # another launcher on this host holds the port
    _report(settings, place)
    if port is None:
        await_endpoint(endpoint, settings.wait, print_line)
    return place, port


def rendezvous_options(settings: LaunchSettings, place: Place) -> list[str]:
    """Returns `torchrun`'s options for the rendezvous; PET_RDZV_CONF and PET_LOCAL_ADDR take precedence."""
    assert settings.endpoint is not None
    # The host of the store gives up first, because it knows the missing hosts, and the first host to give up ends the
    # others.
    timeout = settings.join_timeout + (0 if place.is_host else _LATER_SECONDS)
    values = {"join_timeout": str(timeout)} | _given_configuration()
    if place.is_host is not None:
        values["is_host"] = str(place.is_host).lower()
    options = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        settings.endpoint.text,
        "--rdzv-id",
        settings.run_id,
    ]
    options += ["--rdzv-conf", ",".join(f"{name}={value}" for name, value in values.items())]
    if place.address is not None and not os.environ.get("PET_LOCAL_ADDR"):
        options += ["--local-addr", place.address]
    return options


def _given_configuration() -> dict[str, str]:
    """Returns the settings in `torchrun`'s variable PET_RDZV_CONF."""
    pairs = (pair.split("=", 1) for pair in os.environ.get("PET_RDZV_CONF", "").split(",") if "=" in pair)
    return {name.strip(): value.strip() for name, value in pairs}


def _report(settings: LaunchSettings, place: Place) -> None:
    does = {True: "hosts", False: "joins", None: "meets at"}[place.is_host]
    host = f"host {socket.gethostname()}"
    if place.address is not None:
        host += f", {place.address} on {place.interface},"
    print_line(f"{host} {does} the rendezvous {settings.endpoint} of {settings.nodes} hosts")


def _run_torchrun(
    arguments: Sequence[str], settings: LaunchSettings | None = None, port: HeldPort | None = None
) -> int:
    """Runs `torchrun` in this process, so that the port is released only when `torchrun` is ready to listen there.

    Raises:
        ProcessLost: a training process has ended with an exit code other than 0, or not all hosts have joined.
    """
    # Imported late, because torch takes seconds to import, and earlier errors should appear at once.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    joined = None
    if port is not None and settings is not None:
        joined = JoinedHosts(settings, first=_FIRST_REPORT, every=_LATER_REPORTS)
        joined.start()
        port.close()
    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ProcessLost(
            f"rank {rank} on host {socket.gethostname()} ended with exit code {failure.exitcode}: "
            f"{_reason(failure.message)}"
        ) from error
    except SignalException as error:
        raise ProcessLost(f"stopped by {signal.Signals(error.sigval).name}") from error
    except RendezvousError as error:
        raise ProcessLost(_explain(error, settings, joined)) from error
    return 0


def _explain(error: Exception, settings: LaunchSettings | None, joined: JoinedHosts | None) -> str:
    """Returns, as one line, the reason why not all hosts have joined."""
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    if settings is None:
        return _last_line(error)
    if isinstance(error, RendezvousTimeoutError):
        who = (
            "the launcher's output on the rendezvous host names the missing ones"
            if joined is None
            else joined.describe()
        )
        return (
            f"{settings.endpoint}: not all of NNODES={settings.nodes} hosts joined within {settings.join_timeout} s "
            f"(RDZV_JOIN_TIMEOUT): {who}"
        )
    return (
        f"{settings.endpoint}: {type(error).__name__}: the launcher on the host of the rendezvous has ended "
        f"(as it does if not all of NNODES={settings.nodes} hosts join within {settings.join_timeout} s, "
        "RDZV_JOIN_TIMEOUT), another program uses its port, or a run with this RDZV_ID has already "
        "ended there; see the launcher's output on that host"
    )


def _reason(message: Any) -> str:
    """Returns the error message of a training process, in the format of `error_lines.tell_launcher` or as plain
    text.
    """
    text = message.get("message", message) if isinstance(message, dict) else message
    return _last_line(text).removeprefix("error: ")


def _last_line(text: object) -> str:
    return str(text).strip().rpartition("\n")[2]


def _stop(number: int, frame: FrameType | None) -> None:
    raise ProcessLost(f"stopped by {signal.Signals(number).name} before the training processes started")


if __name__ == "__main__":
    run_main(main)
