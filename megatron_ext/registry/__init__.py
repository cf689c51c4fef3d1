"""Lists the model families and their charts, for tools that open the checkpoint or logs of any run."""
