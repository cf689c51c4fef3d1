"""Corpora: built, tokenizers trained on them, datasets checked and rewritten."""
