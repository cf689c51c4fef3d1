"""Reads GGUF files: their tensors, configuration and tokenizer, in the form of a Hugging Face directory."""
