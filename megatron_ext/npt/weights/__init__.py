"""The weights of NP components: adding them to a base model, their files, resuming a run, validating a checkpoint."""
