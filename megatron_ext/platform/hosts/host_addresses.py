"""The addresses of this host and of an endpoint, and the interface that leads to another host."""

import socket
from dataclasses import dataclass

import psutil

DEFAULT_PORT = 29400
"""Default port of an endpoint, as in `torchrun`."""

_INTERNET = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class Address:
    """An IP address."""

    family: socket.AddressFamily
    text: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can use the address."""
        return self.text == "::1" or self.text.startswith("127.")


@dataclass(frozen=True)
class Endpoint:
    """A host and a port, and the environment variable that contains them, for messages."""

    variable: str
    text: str

    @property
    def host(self) -> str:
        """The name or address, without the brackets of an IPv6 address."""
        return self._parts()[0]

    @property
    def port(self) -> int:
        """The port."""
        return self._parts()[1]

    def __str__(self) -> str:
        return f"{self.variable}={self.text}"

    def addresses(self) -> list[Address]:
        """Returns the addresses of the host.

        Raises:
            ValueError: the endpoint is malformed, or its name does not resolve.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise ValueError(
                f"{self}: the name {self.host} does not resolve on host {socket.gethostname()} ({error.strerror})"
            ) from error
        return [Address(family, str(address[0])) for family, _, _, _, address in found if family in _INTERNET]

    def _parts(self) -> tuple[str, int]:
        host, port = self.text, str(DEFAULT_PORT)
        if not self.text.endswith("]") and (self.text.startswith("[") or self.text.count(":") == 1):
            host, _, port = self.text.rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"{self}: must be HOST:PORT, with a port from 1 to 65535")
        return host, int(port)


def interfaces_by_address() -> dict[str, str]:
    """Maps each IP address of this host to the name of its interface."""
    return {
        address.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in _INTERNET
    }


def source_address(destination: Address, port: int) -> str | None:
    """Returns the address from which this host would send to a destination; None if no route leads there."""
    with socket.socket(destination.family, socket.SOCK_DGRAM) as route:
        try:
            route.connect(
                (destination.text, port)
            )  # connecting a datagram socket only chooses the route; nothing is sent
        except OSError:
            return None
        return str(route.getsockname()[0])
