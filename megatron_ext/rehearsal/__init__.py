"""Rehearses one rank of a cluster run on a simulated GPU, in one process and without a GPU.

The run's own code builds the model, trains two steps and evaluates, on fake CUDA tensors (which have a shape, a type
and a device, but no values and no memory) under a fake process group. A recorder counts allocations, messages and
waits. See docs/rehearsal.md.
"""
