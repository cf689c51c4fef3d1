"""The objectives of a stack: next token, masked tokens, diffusion; masks, time, and generation by unmasking."""
