"""Memory outside of torch's allocators."""
