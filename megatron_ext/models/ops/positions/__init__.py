"""Rotary frequencies that are scaled for sequences longer than the model was first trained on."""
