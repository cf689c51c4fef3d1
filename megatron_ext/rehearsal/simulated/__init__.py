"""The simulated device and process group: they answer torch as a GPU and other processes would."""
