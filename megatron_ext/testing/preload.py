"""Imported once by the fork server, so that test processes start quickly. Must start no threads or process groups."""

import megatron_ext.platform.process_groups
import megatron_ext.testing.checkpoint_runs
import megatron_ext.training.pretrain  # noqa: F401
