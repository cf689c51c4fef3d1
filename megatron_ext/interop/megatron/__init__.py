"""Reads and writes Megatron-LM's checkpoints in the `torch_dist` format; see docs/interop.md."""
