"""LoRA adapters, frozen layers, and precision by layer down to four bits."""
