"""Configuration of progressive training."""
