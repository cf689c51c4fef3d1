"""Lets the launchers of a run find each other before torch's store is ready.

The endpoint is the address (host and port) at which the launchers meet. One launcher listens at its port until the
store takes the port over; the launchers of other hosts connect to it and send the first message of a store's client.
The answer comes from the store or, while `torchrun` starts, from the launcher that holds the port. A service that
accepts connections but does not answer is therefore recognized as another program.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable

from megatron_ext.platform.hosts.host_addresses import Endpoint

_ATTEMPT_SECONDS = 5.0
"""Seconds for one attempt to connect if packets are dropped without an answer."""

_PATIENCE_SECONDS = 2.0
"""Seconds before a launcher reports that it waits, because hosts do not start at exactly the same time."""

_PROBE_SECONDS = 1.0
"""Seconds to wait for an answer to `_PING`, or for a client's `_PING`."""

_NONCE = struct.pack("=I", 0x6D78706C)
_PING = struct.pack("=BIB", 0, 0x3C85F7CE, 13) + _NONCE
"""The first messages of a TCPStore client, VALIDATE and PING; the store answers with the nonce."""

_BACKLOG = 4096
"""Largest number of waiting connections; every host connects once."""


class HeldPort:
    """Listens at a port until `torchrun` does, and answers the launchers of other hosts."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, name="held port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Releases the port, and disconnects clients of the store that have come too early; they connect again."""
        self._listening.shutdown(socket.SHUT_RDWR)  # ends `accept`, which would otherwise keep the port open
        self._thread.join()
        self._listening.close()
        for client in self._clients:
            _reset(client)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            if _answer(client):
                client.close()
            else:
                self._clients.append(client)


def _answer(client: socket.socket) -> bool:
    """Answers a launcher; returns False, without answering, if the client is not a launcher (such as torch's
    client).
    """
    client.settimeout(_PROBE_SECONDS)
    try:
        if client.recv(len(_PING)) != _PING:
            return False
        client.sendall(_NONCE)
        client.recv(
            1
        )  # wait until the launcher has closed, so that the system does not reserve the port for late packets
    except OSError:
        return False
    return True


def _reset(client: socket.socket) -> None:
    # Close without lingering; otherwise the closed connection would keep the port in use for a minute.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def hold_port(endpoint: Endpoint) -> HeldPort | None:
    """Listens at the endpoint's port until `torchrun` does, so that other hosts see early that this host is ready.

    Returns:
        The held port; None if it is in use by another launcher on this host, which then hosts the store.
    """
    family = endpoint.addresses()[0].family
    try:
        return HeldPort(socket.create_server(("", endpoint.port), family=family, backlog=_BACKLOG))
    except OSError:
        return None


def await_endpoint(endpoint: Endpoint, seconds: float, tell: Callable[[str], None]) -> None:
    """Waits until a launcher or its store answers at the endpoint.

    Args:
        endpoint: the address to connect to.
        seconds: longest time to wait.
        tell: function that prints a line; called once if there is no answer within two seconds.

    Raises:
        OSError: there was no answer in that time, or another service has answered.
    """
    started, told = time.monotonic(), False
    deadline = started + seconds
    while True:
        reason = _try_connecting(endpoint, deadline)
        if reason is None:
            return
        if time.monotonic() >= deadline:
            raise OSError(
                f"{endpoint}: cannot be reached from host {socket.gethostname()} within {seconds:g} s (RDZV_WAIT): "
                f"{reason}; start the launcher on the host with this address, and give all launchers the same endpoint"
            )
        if not told and time.monotonic() > started + _PATIENCE_SECONDS:
            tell(f"waiting up to {seconds:g} s for {endpoint}: {reason}")
            told = True
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))


def _try_connecting(endpoint: Endpoint, deadline: float) -> str | None:
    """Returns None if one of the endpoint's addresses answers, otherwise the reasons why none does."""
    reasons = []
    for address in endpoint.addresses():
        remaining = max(0.1, min(_ATTEMPT_SECONDS, deadline - time.monotonic()))
        try:
            connection = socket.create_connection((address.text, endpoint.port), timeout=remaining)
        except OSError as error:
            reasons.append(f"{address.text} port {endpoint.port}: {(error.strerror or str(error)).lower()}")
            continue
        with connection:
            answer = _probe(connection)
        if answer and _NONCE.startswith(answer):
            return None
        if answer:
            raise OSError(
                f"{endpoint}: another service answers there (with {answer!r}), not a launcher; give "
                "every launcher the same port, one that no other program uses"
            )
        reasons.append(f"{address.text} port {endpoint.port} accepts connections, but does not answer")
    return "; ".join(reasons)


def _probe(connection: socket.socket) -> bytes:
    """Pings the other side as clients of torch's store do; returns the first bytes of its answer, if it comes soon."""
    connection.settimeout(_PROBE_SECONDS)
    try:
        connection.sendall(_PING)
        return connection.recv(len(_NONCE))
    except OSError:
        return b""  # the launcher is just releasing the port for its store
