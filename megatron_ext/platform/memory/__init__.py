"""Allocates memory for tensors outside of torch's allocators."""
