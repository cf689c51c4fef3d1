"""A Python interpreter for shell scripts; its processes have already imported torch and megatron-core."""
