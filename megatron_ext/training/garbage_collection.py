"""Collects Python's garbage in the same steps on every rank (`--manual-gc`), instead of automatically.

An automatic collection takes long in a large process. Each rank would collect in a different step, and all other
ranks would have to wait in this step.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def manual_collection() -> Iterator[None]:
    """Context manager: collects once and then only on demand, until the block ends."""
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
