"""Checkpoints: files, tensors, optimizer and random state, the run directory and its lock."""
