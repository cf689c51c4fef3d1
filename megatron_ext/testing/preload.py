"""What the fork server imports once, so that each test process starts at once. Starts no threads, no process group."""

import megatron_ext.platform.process_groups
import megatron_ext.testing.checkpoint_runs
import megatron_ext.training.pretrain  # noqa: F401
