"""Progressive runs, and the Python API."""
