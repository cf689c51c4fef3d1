"""Memory of this process: what its device has allocated on a GPU, resident memory on a CPU.

On a CPU resident memory counts everything the process holds: parameters, activations, and also Python, torch and pages
of data files that are mapped into memory. The peak is the process's own, since it started.
"""

import resource
import sys
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes in use by this process on its device."""

    current: int
    """Now: allocated by torch on the GPU, or resident on the CPU."""

    peak: int
    """The most so far."""

    reserved: int
    """Held by torch's allocator on the GPU, unused blocks included; resident memory on the CPU."""


def memory_use() -> MemoryUse:
    """Current and peak memory of this process; on a GPU of its current device."""
    if torch.cuda.is_available():
        return MemoryUse(
            current=torch.cuda.memory_allocated(),
            peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
        )
    resident = psutil.Process().memory_info().rss
    return MemoryUse(current=resident, peak=max(_peak_resident(), resident), reserved=resident)


def _peak_resident() -> int:
    """The kernel's high-water mark. `getrusage` would not do: a child starts with its parent's peak there."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            marks = [line.split()[1] for line in status if line.startswith("VmHWM:")]
        return int(marks[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
