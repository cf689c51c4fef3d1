"""Attention, rotary embedding, norm, SwiGLU and cross-entropy; some have hand-written gradients."""
