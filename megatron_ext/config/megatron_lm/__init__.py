"""Support for Megatron-LM's command line: the meaning of each flag of its `pretrain_gpt.py` here, and its
defaults.
"""
