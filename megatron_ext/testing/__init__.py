"""Helpers for tests: runs in several gloo processes, tiny models and datasets, reference implementations."""
