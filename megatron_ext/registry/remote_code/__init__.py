"""Exports models with per-layer embeddings or NPT layers as Hugging Face directories that contain the model's
code.
"""
