"""Writes a checkpoint's files, either directly or from a copy while training continues."""
