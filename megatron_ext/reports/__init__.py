"""Draws results: reads TensorBoard files as curves, draws charts as SVG, and writes self-contained HTML pages.

Nothing here depends on a family: the functions take plain numbers and texts, and labels say what they mean.
"""
