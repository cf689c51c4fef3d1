"""Progress bars and optional packages of the data tools."""
