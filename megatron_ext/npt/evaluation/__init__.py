"""Evaluates an NPT model against its base model: compares the layers, writes a report, and generates texts."""
