"""NPT training runs (all layers together, or one layer after the other), and the Python API."""
