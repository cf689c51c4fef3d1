"""Training objectives (next token, masked tokens, diffusion), their masks and time steps, and generation by unmasking.

Each stack (the layers that are trained together in one phase of training) has an objective.
"""
