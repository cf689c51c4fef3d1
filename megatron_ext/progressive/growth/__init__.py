"""Grows a model: its stacks, the phases of training, the trained parts of each phase, and a new stack's initial
weights.
"""
