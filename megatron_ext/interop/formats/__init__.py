"""Reads and writes the files of a Hugging Face model: configuration, weights and tokenizer."""
