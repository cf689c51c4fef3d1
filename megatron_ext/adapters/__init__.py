"""LoRA adapters for the model in a checkpoint: the loaded weights are frozen, and only the adapters train."""
