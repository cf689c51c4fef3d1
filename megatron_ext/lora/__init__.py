"""LoRA adapters, frozen layers, and a precision per layer, down to four bits."""
