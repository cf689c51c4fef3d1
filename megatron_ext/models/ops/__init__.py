"""Operations of a layer, some with hand-written gradients: attention, rotary positions, norm, SwiGLU, cross-entropy."""
