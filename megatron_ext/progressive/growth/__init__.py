"""Racks, stacks and phases, and the initial weights of new stacks."""
