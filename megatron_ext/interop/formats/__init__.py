"""Reads and writes Hugging Face's files: configuration, weights and tokenizer."""
