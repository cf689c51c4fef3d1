"""The training loop, optimizer, schedules, checkpoints, metrics, logging and signals; independent of the families."""
