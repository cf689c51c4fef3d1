"""The record of what a rehearsed rank does."""
