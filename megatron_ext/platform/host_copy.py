"""Copies values from the device to the host without making the host wait when the copy is ordered."""

from typing import Any

import torch


class HostCopy:
    """A copy of a tensor in host memory, which is complete when the device has done the work that was queued before."""

    def __init__(self, value: torch.Tensor) -> None:
        """Orders the copy; on the CPU it is the tensor itself."""
        self._value = value.to("cpu", non_blocking=True)  # into pinned memory
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def tolist(self) -> Any:
        """Returns the values as nested lists; waits until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.tolist()
