"""Evaluation of an NPT model against its base model: comparison, report, generated texts."""
