"""What NP components add to a model: parameters, and FLOPs of their matrix products for a token.

    target           low_rank                      outer_product                       affine
    gate, up, fc1    k r (h + f)                   k r (2 h + f)                       k h       parameters
                     2 k r (2 h + f)               2 k r (2 h + f)                     2 k h     FLOPs
    down             k r (2 h + f)                 k r (2 h + f)                       k f       parameters
                     2 k r (2 h + f)               2 k r (2 h + f)                     2 k f     FLOPs

for every converted layer and target. low_rank reads x and a with one factor, A: one set of parameters, two products.
"""

from megatron_ext.config.model import ModelConfig
from megatron_ext.models.accounting import ModelCost
from megatron_ext.npt.config import NPTModuleConfig


def npt_cost(settings: NPTModuleConfig, model: ModelConfig) -> ModelCost:
    """Cost of the NP components in `model`.

    Args:
        settings: NPT's configuration.
        model: the base model.

    Raises:
        ValueError: the layers or the target do not fit the model.
    """
    settings.check_model(model.swiglu)
    hidden, ffn, rank = model.hidden_size, model.resolved_ffn_hidden_size, settings.total_rank
    parameters, flops = 0, 0
    for target in settings.targets:
        shares_a = settings.np_form == "low_rank" and target != "down"
        affine = settings.num_np_components * (ffn if target == "down" else hidden) * settings.has_affine
        parameters += rank * ((1 if shares_a else 2) * hidden + ffn) + affine
        flops += 2 * rank * (2 * hidden + ffn) + 2 * affine
    layers = len(settings.layers(model.num_layers))
    return ModelCost(parameters=layers * parameters, forward_flops_per_token=float(layers * flops))
