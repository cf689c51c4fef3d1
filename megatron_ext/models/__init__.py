"""The base model on megatron-core: attention, norm, the extended layer and its slots. No I/O, no loops, no flags."""
