"""Counts the bytes that a block of code allocates for tensors: the bytes allocated now, and their peak.

On a GPU the counts come from torch's caching allocator. A CPU has no such allocator: there, every storage that an
operation returns is counted until it is freed. This is exact, but does not include a kernel's temporary memory.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.platform.process_groups import use_cuda


class AllocationCounter(TorchDispatchMode):
    """Counts the allocations made inside the block `with AllocationCounter() as counter:`."""

    def __init__(self) -> None:
        super().__init__()
        self._live = 0
        self._peak = 0
        self._before = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __enter__(self) -> "AllocationCounter":
        if use_cuda():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        # Do not enter the dispatch mode on a GPU, because under such a mode torch runs compiled functions uncompiled.
        if not use_cuda():
            super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._skip(args, kwargs)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    @property
    def current(self) -> int:
        """Bytes that were allocated inside the block and have not been freed."""
        return torch.cuda.memory_allocated() - self._before if use_cuda() else self._live

    @property
    def peak(self) -> int:
        """The largest value of `current` so far."""
        return torch.cuda.max_memory_allocated() - self._before if use_cuda() else self._peak

    def _skip(self, args: Any, kwargs: Any) -> None:
        """Marks an operation's inputs as known, so that views of tensors made before the block are not counted."""
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, torch.Tensor):
                self._known.add(value.untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._live += storage.nbytes()
        self._peak = max(self._peak, self._live)
        # Pass the size now, because a storage that is being finalized no longer has one.
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self._live -= size
