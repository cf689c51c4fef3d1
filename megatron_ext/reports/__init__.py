"""Pictures and pages of results: TensorBoard files as curves, charts as SVG, one HTML page that opens offline.

Knows no family: plain numbers and texts come in, and what they mean stands in their labels.
"""
