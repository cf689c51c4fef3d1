"""Imports the engine once, quietly: the warnings of its imports are not ours and would fail the tests as errors."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_ext.platform.process_groups  # noqa: F401
