"""The interface between a model family and the training system: hooks, and the loss on the model's output."""
