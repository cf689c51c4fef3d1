"""Loads a trained model in any parallel layout, generates text with it and measures its perplexity."""
