"""Console output and optional packages of the data tools."""
