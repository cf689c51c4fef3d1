"""Metrics, progress line, TensorBoard, Weights & Biases."""
