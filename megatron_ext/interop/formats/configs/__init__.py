"""Reads and writes the configuration of a Hugging Face model: one file per subject and per architecture family."""
