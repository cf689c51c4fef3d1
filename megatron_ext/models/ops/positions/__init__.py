"""Scales rotary frequencies for sequences longer than those on which the model was first trained."""
