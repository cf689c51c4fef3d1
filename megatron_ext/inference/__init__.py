"""Loads a trained model at any parallel layout, generates text with it and measures its perplexity."""
