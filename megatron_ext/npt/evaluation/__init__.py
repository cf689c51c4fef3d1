"""Evaluates an NPT model against its base model: comparison of the layers, report, generated texts."""
