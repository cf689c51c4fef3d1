"""Reads, checks and writes indexed datasets on disk, and the manifest beside each dataset."""
