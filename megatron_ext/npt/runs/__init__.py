"""NPT runs: joint, layer by layer, and the Python API."""
