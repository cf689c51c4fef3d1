"""Megatron-LM's command line here: what becomes of each flag of its `pretrain_gpt.py`, and its defaults."""
