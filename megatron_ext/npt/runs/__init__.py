"""NPT runs (all layers together, or layer by layer), and the Python API."""
