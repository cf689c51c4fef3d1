"""Runs Transformer Engine's own Python classes on a CPU, over a reference of its compiled extension in torch."""
