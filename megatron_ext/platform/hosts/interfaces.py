"""Chooses the interface through which gloo and NCCL reach the other hosts of a run."""

import os
import socket

from megatron_ext.platform.hosts.host_addresses import Endpoint, interfaces_by_address
from megatron_ext.platform.hosts.rendezvous import Place, find_place

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def take_interface(endpoint: Endpoint) -> Place:
    """Finds this host's place in the rendezvous, and makes gloo and NCCL use the interface that leads there.

    Raises:
        ValueError, OSError: as in `find_place`; also if the user has chosen an interface that this host does not
            have.
    """
    held = interfaces_by_address()
    _check_interfaces(set(held.values()))
    place = find_place(endpoint, held)
    _set_interfaces(place)
    return place


def _check_interfaces(known: set[str]) -> None:
    """Refuses a GLOO_SOCKET_IFNAME that this host does not have; gloo would fail later, without naming the
    interface.
    """
    given = os.environ.get("GLOO_SOCKET_IFNAME", "")
    for name in filter(None, given.split(",")):
        if name not in known:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={given}: host {socket.gethostname()} has no interface {name} with an address; "
                f"it has {', '.join(sorted(known))}"
            )


def _set_interfaces(place: Place) -> None:
    """Makes gloo and NCCL use the interface that leads to the endpoint, unless the user has chosen one."""
    if place.interface is not None:
        for name in _INTERFACE_VARIABLES:
            os.environ.setdefault(name, place.interface)
