"""The modules of an NPT layer, and their configuration."""
