"""One training step on megatron-core: micro-batches, optimizer, gradient norms."""
