"""Counts the parameters, FLOPs and activations that AltUp and Laurel (from Gemma 3n) add to a model.

    parameters   layer   AltUp   k h + k^3 + k^2 + norm        Laurel   2 r h + norm
                 ends    AltUp   2 (k - 1) h^2
    FLOPs        layer   AltUp   4 k h + 2 k^3 + 2 k^2 + 2 k^2 h        Laurel   4 r h
                 ends    AltUp   4 (k - 1) h^2

Letters: k residual streams, h hidden size, r Laurel's rank. The ends are the matrices that build the streams before
the first layer and join them after the last one. FLOPs are per token.

A layer keeps the following values per token for the backward pass, with h divided under sequence parallelism. AltUp:
its input and the predictions (2 k h); both routers' inputs, the layer's output and its difference from the prediction
(4 h, of which the base layer counts one h). Laurel: its input and the input of its norm (2 h), and the low-rank
values (r). Sparse activations keep the same values as gated activations.
"""

from megatron_ext.config.groups.model_config import ModelConfig


def added_to_layer(model: ModelConfig) -> int:
    """Returns the number of parameters added to one layer, without the two norms; every rank holds all of them."""
    streams, hidden = model.altup_streams or 0, model.hidden_size
    return streams * (hidden + streams**2 + streams) + 2 * (model.laurel_rank or 0) * hidden


def further_norms(model: ModelConfig) -> int:
    """Returns the number of norms added to one layer."""
    return (model.altup_streams is not None) + (model.laurel_rank is not None)


def parameters_of_end(model: ModelConfig) -> int:
    """Returns the number of parameters added before the first layer, or after the last one."""
    return ((model.altup_streams or 1) - 1) * model.hidden_size**2


def layer_flops(model: ModelConfig) -> float:
    """Returns the forward FLOPs per token added to one layer."""
    streams, hidden = model.altup_streams or 0, model.hidden_size
    of_altup = 4 * streams * hidden + 2 * streams**3 + 2 * streams**2 + 2 * streams**2 * hidden
    return float(of_altup + 4 * (model.laurel_rank or 0) * hidden)


def layer_activations(model: ModelConfig, hidden_bytes: float) -> float:
    """Returns the bytes that AltUp and Laurel add to those that one layer keeps for the backward pass.

    Args:
        model: configuration of the base model.
        hidden_bytes: size of one residual stream.
    """
    streams, rank = model.altup_streams, model.laurel_rank
    kept = 0.0 if streams is None else 2.0 * streams + 3.0
    kept += 0.0 if rank is None else 2.0 + rank / model.hidden_size
    return kept * hidden_bytes


def end_activations(model: ModelConfig, hidden_bytes: float) -> float:
    """Returns the bytes kept before the first layer, or after the last one, in addition to the residual stream."""
    # The projected streams, and the projected streams times the required magnitude.
    return 2.0 * ((model.altup_streams or 1) - 1) * hidden_bytes
