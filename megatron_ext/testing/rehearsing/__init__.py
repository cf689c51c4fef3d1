"""Rehearsals for tests."""
