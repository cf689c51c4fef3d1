"""Checkpoints: files, tensors, optimizer state, random state, checks of the run directory, and the directory's lock."""
