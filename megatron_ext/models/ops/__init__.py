"""Attention, rotary embedding, norm, gated activations and cross-entropy; some have hand-written gradients."""
