"""Racks, stacks, phases, and how a stack gets its first weights."""
