"""Megatron-core, extended: per-layer embeddings, neuro-plastic layers and progressive growth on the real engine."""

import warnings

# What the engine says about itself and no user can act on: that optional parts are missing (`--transformer-impl`
# chooses), that it calls torch functions by older names, that it looks at gradients of views.
for _message in (
    r"(Transformer Engine and Apex are|Apex is) not installed",
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
):
    warnings.filterwarnings("ignore", message=_message)
