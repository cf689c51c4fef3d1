"""Self-attention with two features that megatron-core lacks: a KV cache no longer than the sliding window, and keys and
values that several layers share.
"""
