"""The simulated device and process group, which behave towards torch like a GPU and other processes."""
