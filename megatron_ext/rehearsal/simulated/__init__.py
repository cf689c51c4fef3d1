"""The simulated device: what torch asks of a GPU and of other processes, without either."""
