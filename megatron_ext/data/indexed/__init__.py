"""Indexed datasets on disk and the manifest beside them."""
