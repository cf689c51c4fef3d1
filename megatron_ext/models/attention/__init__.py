"""Self-attention with two features that megatron-core lacks: a bounded KV cache, and keys and values of other
layers.
"""
