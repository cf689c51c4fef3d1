"""What a stack is trained for: masks, time, sampling by unmasking."""
