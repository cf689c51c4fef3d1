"""Helpers for tests: several processes on gloo, tiny configurations, reference implementations."""
