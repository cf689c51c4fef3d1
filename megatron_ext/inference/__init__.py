"""What is done with a trained model: load it at any cut, generate text, measure perplexity."""
