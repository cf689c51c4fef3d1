"""The interface between a family and the training system: hooks, and the loss on the model's output."""
