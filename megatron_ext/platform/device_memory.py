"""Memory of this process: what its device has allocated on a GPU, resident memory on a CPU.

On a CPU resident memory counts everything the process holds: parameters, activations, and also Python, torch and pages
of data files that are mapped into memory. The peak is the process's own, since it started.
"""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

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


def host_memory() -> int:
    """Bytes of memory that the processes of this machine may use together: all of it, or their control group's part."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def device_memory() -> tuple[int, bool]:
    """Bytes of memory of this process's device, and whether all processes of the machine share them (a CPU's)."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory), False
    return host_memory(), True


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
