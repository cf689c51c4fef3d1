"""Counts the device memory of a rehearsed rank: every storage from its first operation until it is freed.

    kind of memory     weights, gradients, optimizer, activations, temporary
    place              for activations, the module (all layers together); otherwise the line of code

The phase in which an allocation is made determines its kind. Allocations that the first update makes and keeps are
optimizer state, and allocations of a forward pass are activations; all others, except weights and gradient buffers,
are temporary. Sizes are rounded up as in torch's allocator. Its fragmentation, and memory that torch does not
allocate, are not counted.
"""

import weakref
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, TEMPORARY = "activations", "temporary"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARY)

_ROUND = 512  # bytes; the smallest block of torch's CUDA allocator


@dataclass(slots=True)
class Allocation:
    """One storage on the device."""

    size: int
    kind: str
    scope: str
    phase: str
    place: str
    is_live: bool = True


@dataclass(frozen=True)
class Peak:
    """The largest memory of a phase, and the allocations that are live then."""

    size: int
    """Bytes of all live allocations together."""

    kinds: Counter[str]
    """Bytes by kind."""

    places: Counter[tuple[str, str]]
    """Bytes by kind and place."""

    moment: tuple[str, str]
    """Scope and phase at the peak."""


class MemoryLog:
    """The allocations of a rehearsed rank, in order."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.live = 0
        self.peak = 0
        # One entry per event: n + 1 when allocation number n is made, and -(n + 1) when it is freed.
        self._events = array("q")
        self._known: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def knows(self, storage: torch.UntypedStorage) -> bool:
        """Returns whether the storage has already been counted."""
        return storage._cdata in self._known

    def add(self, storage: torch.UntypedStorage, kind: str, scope: str, phase: str, place: str) -> None:
        """Counts a new storage until it is freed."""
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        number, address = len(self.allocations), storage._cdata
        self.allocations.append(Allocation(size, kind, scope, phase, place))
        self._known[address] = number
        self._watched[number] = weakref.ref(storage, partial(self._free, number, address))
        self._events.append(number + 1)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, number: int, address: int, _: object) -> None:
        allocation = self.allocations[number]
        allocation.is_live = False
        self.live -= allocation.size
        self._events.append(-number - 1)
        self._known.pop(address, None)
        self._watched.pop(number, None)

    def reset_peak(self) -> None:
        """Resets `peak` to the current size."""
        self.peak = self.live

    def mark(self, tensors: Iterable[torch.Tensor], kind: str, place: str | None = None) -> None:
        """Sets the kind of the given tensors' memory, and its place if one is given."""
        for tensor in tensors:
            number = self._known.get(tensor.untyped_storage()._cdata)
            if number is not None:
                allocation = self.allocations[number]
                allocation.kind, allocation.place = kind, place or allocation.place

    def keep(self, phase: str, kind: str) -> None:
        """Sets the kind of a phase's temporary allocations that are still live after the phase."""
        for allocation in self.allocations:
            if allocation.is_live and allocation.phase == phase and allocation.kind == TEMPORARY:
                allocation.kind, allocation.place = kind, "made by the first update, such as Adam's moments"

    def at_peak(self, scopes: Iterable[str] | None = None, phase: str | None = None) -> Peak:
        """Returns the live allocations at the moment of largest memory, in the whole run or in a phase.

        Args:
            scopes: consider only moments at which something is allocated in one of these scopes.
            phase: consider only moments at which something is allocated in this phase.
        """
        wanted = None if scopes is None else set(scopes)
        live = best = end = 0
        moment = ("", "")
        for index, event in enumerate(self._events):
            allocation = self.allocations[abs(event) - 1]
            live += allocation.size if event > 0 else -allocation.size
            counts = wanted is None or allocation.scope in wanted
            if event > 0 and live > best and counts and (phase is None or allocation.phase == phase):
                best, end, moment = live, index + 1, (allocation.scope, allocation.phase)
        kinds: Counter[str] = Counter()
        places: Counter[tuple[str, str]] = Counter()
        for event in self._events[:end]:
            allocation = self.allocations[abs(event) - 1]
            signed = allocation.size if event > 0 else -allocation.size
            kinds[allocation.kind] += signed
            places[allocation.kind, allocation.place] += signed
        return Peak(best, +kinds, +places, moment)
