"""A Python interpreter for shell scripts, whose processes have already imported torch and the engine."""
