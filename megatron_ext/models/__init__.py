"""The base model on megatron-core: attention, norm, and the layer with slots for the families' modules.

Nothing in this package reads files, runs a training loop or defines flags.
"""
