"""LoRA adapters over any model that a checkpoint holds: everything loaded is frozen, and only the adapters train."""
