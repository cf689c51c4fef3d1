"""Turns indexed datasets into training samples: blends, splits, epochs, samplers and loader processes."""
