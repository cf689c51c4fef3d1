"""Rehearses runs in tests."""
