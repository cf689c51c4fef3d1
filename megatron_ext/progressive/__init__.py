"""Progressive (StackWise): a model grown stack by stack over a frozen or LoRA trunk. Source: document 004."""
