"""Counts the parameters that per-layer embedding (PLE) adds to a model, and the forward FLOPs per token.

    parameters   Vp L p + h L p + p + L (2 h p + h)          + 2 p p L for concat and gated
    FLOPs        L 6 h p                                     + L 4 p p for concat and gated

Letters: Vp rows of a table, L layers, h hidden size, p per-layer hidden size. The terms of the parameters are, in this
order: tables, context projections, the shared norm, then gate, output projection and post-norm of every layer. Only
matrix products count as FLOPs; a table look-up costs none.
"""

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.costs.model_cost import ModelCost
from megatron_ext.per_layer.per_layer_config import PerLayerConfig


def per_layer_cost(settings: PerLayerConfig, model: ModelConfig, rows: int) -> ModelCost:
    """Returns the cost of PLE.

    Args:
        settings: PLE's configuration.
        model: configuration of the base model.
        rows: Vp, the number of rows of a table (`PerLayerConfig.rows`).
    """
    layers, hidden, width = model.num_layers, model.hidden_size, settings.per_layer_hidden_size
    combination = 0 if settings.per_layer_combination_method == "scaled_add" else 2 * width * width
    of_a_layer = rows * width + 3 * hidden * width + hidden + combination
    return ModelCost(
        parameters=layers * of_a_layer + width,
        forward_flops_per_token=float(layers * (6 * hidden * width + 2 * combination)),
    )
