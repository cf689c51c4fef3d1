"""Sets whether glibc's allocator keeps freed blocks or returns them to the system; no effect with other C libraries."""

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from malloc.h
_returns_blocks = False


def keep_freed_memory() -> None:
    """From now on, keeps large freed blocks for reuse by later steps; does nothing after `return_freed_memory`."""
    if _returns_blocks:
        return
    # Every step allocates and frees the same activations; with glibc's defaults, the system maps and zeroes each of
    # them anew. With these settings, a step of the benchmark is about 5 % faster.
    _set({_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: 1 << 30, _M_TOP_PAD: 1 << 26})


def return_freed_memory() -> None:
    """From now on, returns blocks of at least 1 MB to the system as soon as they are freed.

    For programs that process one large tensor after another, such as a conversion.
    """
    # Otherwise small blocks that stay, such as names, come to lie between large ones that are freed: the gaps took half
    # the size of a model that was converted.
    global _returns_blocks
    _returns_blocks = True
    _set({_M_MMAP_THRESHOLD: 1 << 20})


def _set(parameters: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
