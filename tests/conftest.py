"""Imports the engine once, quietly: the warnings of its imports are not ours and would fail the tests as errors."""

import gc
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_ext.platform.process_groups  # noqa: F401


def pytest_collection_finish() -> None:
    """Exempts the million objects that are imported by now from the garbage collector, which finds no garbage there."""
    gc.freeze()
