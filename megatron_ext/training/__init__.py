"""Training loop, optimizer, schedules, checkpoints, metrics, logging and signals; independent of model families."""
