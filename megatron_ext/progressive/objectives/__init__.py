"""Objectives of a stack (next token, masked tokens, diffusion), their masks and time steps, generation by unmasking."""
