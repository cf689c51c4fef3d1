"""Formulas for a model's parameter count, FLOPs and memory."""
