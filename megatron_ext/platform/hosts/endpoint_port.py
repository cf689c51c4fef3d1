"""The port of the endpoint until torch's store has it: held by one launcher, awaited by those of the other hosts.

A launcher that waits sends what a client of the store would send first, and is answered by the store or, while
`torchrun` starts, by the launcher that holds the port. So a service that accepts connections and never answers is known
to be neither.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable

from megatron_ext.platform.hosts.host_addresses import Endpoint

_ATTEMPT_SECONDS = 5.0
"""Seconds of one attempt to connect, where a packet is dropped without an answer."""

_PATIENCE_SECONDS = 2.0
"""Seconds without a word: hosts of one run start a moment apart."""

_PROBE_SECONDS = 1.0
"""Seconds for an answer to `_PING`, and for a client to send it."""

_NONCE = struct.pack("=I", 0x6D78706C)
_PING = struct.pack("=BIB", 0, 0x3C85F7CE, 13) + _NONCE
"""What a client of torch's TCPStore sends first, VALIDATE and PING; the store answers with the nonce."""

_BACKLOG = 4096
"""Connections that wait on the listening socket: every host connects once."""


class HeldPort:
    """Listens at a port until `torchrun` does, and answers the launchers of other hosts."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, name="held port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Gives up the port; clients of the store, which have come too early, connect again."""
        self._listening.shutdown(socket.SHUT_RDWR)  # ends `accept`, which would keep the port open
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
    """Answers a launcher; returns False, without an answer, if the client is another one, such as torch's."""
    client.settimeout(_PROBE_SECONDS)
    try:
        if client.recv(len(_PING)) != _PING:
            return False
        client.sendall(_NONCE)
        client.recv(1)  # until the launcher has closed, so that the port is not kept for late packets
    except OSError:
        return False
    return True


def _reset(client: socket.socket) -> None:
    # Without lingering: the connection's end would keep the port in use for a minute.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def hold_port(endpoint: Endpoint) -> HeldPort | None:
    """Listens at the endpoint's port until `torchrun` does, so that other hosts see at once that this one is there.

    Returns:
        The held port; None if it is in use: by another launcher on this host, which then hosts the store.
    """
    family = endpoint.addresses()[0].family
    try:
        return HeldPort(socket.create_server(("", endpoint.port), family=family, backlog=_BACKLOG))
    except OSError:
        return None


def await_endpoint(endpoint: Endpoint, seconds: float, tell: Callable[[str], None]) -> None:
    """Waits until a launcher or its store answers at the endpoint.

    Args:
        endpoint: where to connect.
        seconds: how long to wait.
        tell: prints a line; called once if nothing answers soon.

    Raises:
        OSError: nothing has answered in that time, or another service has answered.
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
                f"{reason}; start the launcher on the host that has this address, with the same variable"
            )
        if not told and time.monotonic() > started + _PATIENCE_SECONDS:
            tell(f"waiting up to {seconds:g} s for {endpoint}: {reason}")
            told = True
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))


def _try_connecting(endpoint: Endpoint, deadline: float) -> str | None:
    """Connects to the first address that answers; returns None, or why none has answered."""
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
                f"{endpoint}: another service answers there (with {answer!r}), not a launcher; "
                "give the port at which the first host's launcher listens"
            )
        reasons.append(f"{address.text} port {endpoint.port} accepts connections, but does not answer")
    return "; ".join(reasons)


def _probe(connection: socket.socket) -> bytes:
    """Returns the first bytes of the answer to a ping of torch's store; none if no answer comes soon."""
    connection.settimeout(_PROBE_SECONDS)
    try:
        connection.sendall(_PING)
        return connection.recv(len(_NONCE))
    except OSError:
        return b""  # the launcher gives up the port for its store in this moment
