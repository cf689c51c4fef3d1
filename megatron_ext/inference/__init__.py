"""What is done with a trained model: load it at any parallel layout, generate text, measure perplexity."""
