"""Training of per-layer tables of which only the rows that a step looks up have gradients and updates."""
