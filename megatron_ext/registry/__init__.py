"""Lists the model families, for tools that open any checkpoint."""
