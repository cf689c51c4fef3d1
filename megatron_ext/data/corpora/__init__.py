"""Builds a corpus, trains tokenizers, verifies and rewrites datasets."""
