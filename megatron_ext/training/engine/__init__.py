"""One training step on the engine: micro-batches, optimizer, gradient norms."""
