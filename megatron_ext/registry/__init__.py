"""The families that a checkpoint may hold."""
