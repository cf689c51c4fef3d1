"""This host's role in a rendezvous: whether it hosts the store, its address for other hosts, and the hosts that
joined.

`torchrun` recognizes a host as the endpoint only if the host's own name resolves to the endpoint's address. On a host
with several interfaces, the name resolves to at most one of their addresses. Therefore this module compares the
endpoint's address with the addresses of all interfaces.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass

import psutil

from megatron_ext.platform.hosts.host_addresses import Endpoint, source_address
from megatron_ext.platform.hosts.launch_settings import LaunchSettings


@dataclass(frozen=True, kw_only=True)
class Place:
    """This host's role in a rendezvous, and its address there."""

    is_host: bool | None
    """Whether this host hosts the store. None lets `torchrun` decide, because the endpoint is a loopback address, or
    is this host's name but resolves to none of its addresses.
    """

    address: str | None
    """The address of this host in the network of the endpoint; None if it is not known."""

    interface: str | None
    """The interface with `address`."""


def find_place(endpoint: Endpoint, held: dict[str, str]) -> Place:
    """Returns this host's place in the rendezvous at an endpoint.

    Args:
        endpoint: the address at which the hosts meet.
        held: this host's interfaces by their addresses.

    Raises:
        ValueError: the endpoint's name does not resolve.
        OSError: no route leads to the endpoint.
    """
    found = endpoint.addresses()
    own = [address for address in found if address.text in held or address.is_loopback]
    outside = [address.text for address in own if not address.is_loopback]
    if outside:
        return Place(is_host=True, address=outside[0], interface=held[outside[0]])
    if own or endpoint.host in (socket.gethostname(), socket.getfqdn()):
        return Place(is_host=None, address=None, interface=None)
    sources = [source_address(address, endpoint.port) for address in found]
    address = next((source for source in sources if source is not None), None)
    if address is None:
        raise OSError(
            f"{endpoint}: host {socket.gethostname()} has no route to {found[0].text}; the host's addresses are "
            f"{', '.join(sorted(held)) or 'none'}"
        )
    return Place(is_host=False, address=address, interface=held.get(address))


class JoinedHosts:
    """On the host of the store, prints the hosts that have joined, until the training processes run."""

    def __init__(self, settings: LaunchSettings, *, first: float, every: float) -> None:
        """Args:
        settings: the launcher's settings, with an endpoint.
        first: seconds until the first line.
        every: seconds between lines.
        """
        self._settings, self._first, self._every = settings, first, every

    def start(self) -> None:
        """Starts the thread that prints; the thread ends by itself."""
        threading.Thread(target=self._run, name="joined hosts", daemon=True).start()

    def describe(self) -> str:
        """Returns text with the number and the addresses of the hosts that have joined."""
        joined = self._joined()
        text = f"{len(joined)} of {self._settings.nodes} hosts have joined"
        if joined:
            text += f" ({', '.join(sorted(set(joined)))})"
        missing = [name for name in self._settings.hosts if not _addresses_of(name) & set(joined)]
        return text + (f"; missing: {', '.join(missing)}" if missing else "")

    def _joined(self) -> list[str]:
        """Returns one address for each launcher that is connected to the store."""
        endpoint = self._settings.endpoint
        assert endpoint is not None
        return [
            connection.raddr.ip.removeprefix("::ffff:")
            for connection in psutil.net_connections("tcp")
            if connection.pid == os.getpid()
            and connection.status == psutil.CONN_ESTABLISHED
            and connection.laddr.port == endpoint.port
        ]

    def _run(self) -> None:
        time.sleep(self._first)
        while not psutil.Process().children():
            print_line(f"{self._settings.endpoint}: {self.describe()}; waiting for the others")
            time.sleep(self._every)


def print_line(text: str) -> None:
    """Prints a line to standard error, with the launcher's prefix."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def _addresses_of(name: str) -> set[str]:
    with contextlib.suppress(OSError):
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    return set()
