"""Runs Transformer Engine's own Python classes on a CPU, with its compiled extension replaced by a reference in
torch.
"""
