"""Measures the memory of this process: memory allocated by torch on a GPU, resident memory on a CPU.

Resident memory includes everything in the process: parameters and activations, but also Python, torch and the pages of
memory-mapped data files. Its peak is the largest value since the process started.
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
    """Bytes that torch has allocated on the GPU; on a CPU, the resident bytes of this process."""

    peak: int
    """The largest value of `current` so far."""

    reserved: int
    """Bytes that torch's allocator holds on the GPU, including free blocks; resident memory on the CPU."""


def host_memory() -> int:
    """Returns the bytes that all processes together may use: this machine's memory, or the cgroup's limit if it is
    lower.
    """
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def device_memory() -> tuple[int, bool]:
    """Returns the total memory of this process's device in bytes, and whether all processes share it (as on a CPU)."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory), False
    return host_memory(), True


def memory_use() -> MemoryUse:
    """Returns the current and peak memory of this process on its current device."""
    if torch.cuda.is_available():
        return MemoryUse(
            current=torch.cuda.memory_allocated(),
            peak=torch.cuda.max_memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
        )
    resident = psutil.Process().memory_info().rss
    return MemoryUse(current=resident, peak=max(_peak_resident(), resident), reserved=resident)


def _peak_resident() -> int:
    """Returns the peak resident bytes of this process."""
    # Do not use `getrusage`, with which a forked child starts with its parent's peak.
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            marks = [line.split()[1] for line in status if line.startswith("VmHWM:")]
        return int(marks[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
