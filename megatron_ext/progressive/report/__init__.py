"""The report that compares progressive training runs."""
