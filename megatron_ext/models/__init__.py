"""The base model, built on megatron-core: attention, norms, and a layer with slots for the modules of model families.

Nothing in this package reads files, runs a training loop or defines flags.
"""
