"""The configuration of progressive training."""
