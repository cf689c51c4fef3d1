"""A report that compares progressive trainings."""
