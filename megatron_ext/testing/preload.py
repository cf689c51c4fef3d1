"""Imports, once in the fork server, all modules that its processes need, so that each process starts in milliseconds.

These are the engine, the three families, and pytest, which every test file imports. No threads are started.
"""

import gc

import pytest  # noqa: F401

import megatron_ext.interop.hf_import
import megatron_ext.npt.runs.npt_run
import megatron_ext.per_layer.per_layer_family
import megatron_ext.progressive.runs.progressive_run
import megatron_ext.testing.checkpoint_runs
import megatron_ext.training.pretrain  # noqa: F401

# Otherwise the garbage collector of each process would visit half a million imported objects, and copy their pages.
gc.freeze()
