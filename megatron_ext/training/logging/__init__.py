"""Metrics, the progress line, TensorBoard, and Weights & Biases."""
