"""The frozen trunk, and the cache of its outputs."""
