"""What training reads from indexed files: blends, splits, epochs, samplers and loader processes."""
