"""Records a rehearsed rank's activity other than computation: collectives, waits of the host for the device, and
suspicious operations.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from megatron_ext.platform.run_phases import EVALUATION, STEP

START, EVALUATE = "start", "evaluation"

_PACKAGE = str(Path(__file__).parents[2])
_OWN = str(Path(__file__).parents[1])
_ENGINE = "/megatron/core/"
_WRAPPERS = ("platform/run_phases.py", "platform/host_copy.py", "platform/engine_imports.py")


@dataclass(frozen=True)
class Call:
    """The properties of a communication call; calls that agree in all of them are counted together."""

    operation: str
    """Name of the operation, such as `all-reduce` or `send`."""

    group: str
    """Short name of the process group, such as `TP`."""

    size: int
    """Number of ranks in the group."""

    device: str
    """Device of the tensors, `cuda` or `cpu`; `object` for Python objects and barriers."""

    asynchronous: bool
    """Whether other operations were executed between the start of the call and the wait for its end."""

    hosts: int
    """Number of hosts on which the group's ranks run."""

    place: str
    """Line of code that makes the call."""


@dataclass
class Total:
    """Number of calls or copies, and the sum of their bytes."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Activity:
    """The record of a rehearsed rank. Entries are grouped by scope: `start`, `step N` or `evaluation`."""

    step: int = 0
    """Number of the current step; 0 before the first one."""

    groups: int = 0
    """Number of process groups that have been created; the rank is a member of only a few of them."""

    operations: int = 0
    """Number of operations that the rank has executed."""

    phases: list[str] = field(default_factory=list)
    """Names of the phases that the run is in, from the outermost."""

    communication: dict[tuple[str, Call], Total] = field(default_factory=dict)
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """Number of waits by scope, kind of wait, and place in the code."""

    copies: dict[tuple[str, str, str], Total] = field(default_factory=dict)
    """Copies between host and device, by scope, direction and place."""

    oddities: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of suspicious operations, which work but should not occur, by scope and description."""

    @property
    def phase(self) -> str:
        """The innermost phase, or "" outside all phases."""
        return self.phases[-1] if self.phases else ""

    @property
    def scope(self) -> str:
        """The current scope."""
        if EVALUATION in self.phases:
            return EVALUATE
        return f"step {self.step}" if self.step else START

    def begin(self, phase: str) -> None:
        """Enters a phase."""
        self.step += phase == STEP
        self.phases.append(phase)

    def end(self) -> None:
        """Leaves the innermost phase."""
        self.phases.pop()

    def communicates(self, call: Call, size: int) -> None:
        """Records one call with tensors of `size` bytes."""
        total = self.communication.setdefault((self.scope, call), Total())
        total.calls += 1
        total.bytes += size

    def is_awaited_at_once(self, scope: str, call: Call, size: int) -> None:
        """Counts a call as synchronous after all, because the rank waited for it immediately.

        Args:
            scope: scope in which the call was counted as asynchronous.
            call: the call, as it was counted.
            size: bytes of its tensors.
        """
        total = self.communication[scope, call]
        total.calls -= 1
        total.bytes -= size
        if not total.calls:
            del self.communication[scope, call]
        awaited = self.communication.setdefault((scope, replace(call, asynchronous=False)), Total())
        awaited.calls += 1
        awaited.bytes += size

    def waits_for_device(self, kind: str) -> None:
        """Records that the host waits until the device has finished its work."""
        self.waits[self.scope, kind, place()] += 1

    def copies_between(self, direction: str, size: int) -> None:
        """Records a copy between host and device."""
        total = self.copies.setdefault((self.scope, direction, place()), Total())
        total.calls += 1
        total.bytes += size

    def is_odd(self, text: str) -> None:
        """Records an oddity at the current line of code."""
        self.oddities[self.scope, f"{text}, at {place()}"] += 1


def place() -> str:
    """Returns the running line of this package, outside the rehearsal; in the engine, also the engine's line."""
    frame: FrameType | None = sys._getframe(1)
    engine = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and not name.startswith(_OWN) and not name.endswith(_WRAPPERS):
            line = f"{name[len(_PACKAGE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
            return f"{engine} < {line}" if engine else line
        if not engine and _ENGINE in name:
            engine = f"core/{name.split(_ENGINE)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return engine or "?"
