"""Helpers for tests: functions run in several gloo processes, tiny models and datasets, reference implementations."""
