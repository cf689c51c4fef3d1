"""Python commands, shell scripts' commands, and `torchrun` with its ranks as forks that have imported the engine."""
