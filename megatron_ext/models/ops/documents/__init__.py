"""Attention for sequences that hold several documents, which do not attend to one another."""
