"""Training datasets over indexed files: blends, epochs, samplers, loader processes."""
