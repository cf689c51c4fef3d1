"""Copies values from the device to the host asynchronously: the host waits only when it reads the values."""

from typing import Any

import torch


class HostCopy:
    """A copy of a tensor in host memory; complete once the device has finished the work queued before it."""

    def __init__(self, value: torch.Tensor) -> None:
        """Starts the copy without waiting for it; a CPU tensor is used without a copy."""
        self._value = value.to("cpu", non_blocking=True)  # into pinned memory
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def tolist(self) -> Any:
        """Returns the values as nested lists; waits until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.tolist()


def read_sizes(sizes: torch.Tensor, expected: list[int]) -> list[int]:
    """Copies sizes to the host, which needs them to allocate tensors; waits for the device.

    A rehearsal, whose tensors have no values, replaces this function. Call it as `host_copy.read_sizes`, so that the
    replacement is called.

    Args:
        sizes: the sizes, [n] integer, on the device.
        expected: the sizes that a rehearsal assumes.
    """
    found: list[int] = sizes.tolist()
    return found
