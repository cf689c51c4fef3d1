"""Presents results: reads TensorBoard files as curves, draws charts as SVG, and writes self-contained HTML pages.

Nothing here depends on a model family: the functions take plain numbers and texts, and the caller provides all labels.
"""
