"""Self-attention with what megatron-core's lacks: a bounded KV cache, and keys and values of other layers."""
