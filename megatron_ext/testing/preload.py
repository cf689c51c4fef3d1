"""Imports once, in the fork server, what its processes need, so that each of them starts in milliseconds.

That is the engine, the three families, and pytest, which every file of tests imports. It starts no threads.
"""

import gc

import pytest  # noqa: F401

import megatron_ext.interop.hf_import
import megatron_ext.npt.runs.npt_run
import megatron_ext.per_layer.per_layer_family
import megatron_ext.progressive.runs.progressive_run
import megatron_ext.testing.checkpoint_runs
import megatron_ext.training.pretrain  # noqa: F401

gc.freeze()  # else each process would look through half a million imported objects, and copy their pages
