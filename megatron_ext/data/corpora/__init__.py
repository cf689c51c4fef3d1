"""Builds a small corpus, trains tokenizers, and verifies, merges, splits and shuffles datasets."""
