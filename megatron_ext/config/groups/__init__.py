"""One frozen dataclass for each group of flags."""
