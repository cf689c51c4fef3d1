"""Models with per-layer embeddings or NPT layers as Hugging Face directories that bring their own code."""
