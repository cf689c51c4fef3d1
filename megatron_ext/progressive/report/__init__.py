"""A report that compares progressive training runs."""
