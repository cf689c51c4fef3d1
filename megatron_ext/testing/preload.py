"""Imports torch and mcore once in the fork server, so that test processes start quickly. It starts no threads."""

import megatron_ext.platform.process_groups
import megatron_ext.testing.checkpoint_runs
import megatron_ext.training.pretrain  # noqa: F401
