"""Data: tokenizers, indexed datasets and their tools, per-layer ids, training datasets and samplers."""
