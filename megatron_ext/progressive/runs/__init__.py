"""Progressive training runs, and their Python API."""
