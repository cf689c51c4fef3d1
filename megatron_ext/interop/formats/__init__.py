"""Hugging Face's files: configuration, weights, tokenizer."""
