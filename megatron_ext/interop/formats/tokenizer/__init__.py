"""Reads and writes the tokenizer files of a Hugging Face model."""
