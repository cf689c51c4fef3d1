"""Progressive runs side by side."""
