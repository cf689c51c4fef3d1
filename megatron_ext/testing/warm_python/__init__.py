"""Runs Python commands, shell scripts and `torchrun` with their processes forked from one that imported the engine."""
