"""What a family hands the training system: its hooks, and its loss on the output."""
