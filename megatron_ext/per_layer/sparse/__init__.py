"""Trains per-layer tables by rows: a step computes gradients and updates only for the rows that it looks up."""
