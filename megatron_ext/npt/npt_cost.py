"""Counts the parameters and FLOPs of the NP components, in a forward pass and in a training step.

The table holds, for one converted layer and one target (a weight matrix that gets a delta), the parameters of the NP
components and the FLOPs per token of a forward pass. `affine` is added for outer_product with the constant c_a:

    target           low_rank              outer_product         affine      key_value
    gate, up, fc1    k r (h + f)           k r (2 h + f)         k h         2 r h          parameters
                     2 k r (2 h + f)       2 k r (2 h + f)       2 k h       4 r h          FLOPs
    down             k r (2 h + f)         k r (2 h + f)         k f         2 r h          parameters
                     2 k r (2 h + f)       2 k r (2 h + f)       2 k f       4 r h          FLOPs

For gate, up and fc1, low_rank multiplies both x and a by the same factor A: one set of parameters, but two products.
In key_value, gate and up are one target, fc1.

The computation of a training step with a frozen base (`npt_work`):

    layers below the first trained one      forward only
    the first trained layer                 forward; fc2's input gradient; NP: gradients of the factors and of u
    layers above                            forward and input gradients; NP: input gradients and, if trained, all others
    teacher, if a loss or a blend needs it  one more forward pass of all layers; of the output layer only for fidelity
    direct MLP, equivalence loss            one more forward pass of the MLP
    local losses (`--layer-losses`)         in addition, in layers whose inputs have gradients, a forward and a backward
                                            pass of the modulated MLP on detached inputs

In layer-parallel training, the layers up to the last trained one run forward. In addition, the modulated MLP of each
trained layer runs forward and backward, as in the first trained layer of the table; nothing else runs.

A layer whose input comes only from the teacher counts like the first trained layer. A backward pass whose gradient is
zero is counted, because it is computed. Small products of size r are not counted; they occur in the losses on the
factors (reconstruction, regularization) and in the measurements every `--npt-log-interval` steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.costs.model_cost import (
    ModelCost,
    core_attention_flops_per_token,
    linear_flops_per_token,
    mlp_flops_per_token,
)
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.objective.step_objective import StepObjective


def npt_cost(settings: NPTModuleConfig, model: ModelConfig) -> ModelCost:
    """Returns the parameters and FLOPs that the NP components add to the model.

    Args:
        settings: NPT's configuration.
        model: configuration of the base model.

    Raises:
        ValueError: the layers or the target do not fit the model.
    """
    settings.check_model(model.is_gated, model.changes_outputs)
    layers = settings.layers(model.num_layers)
    flops = sum(sum(of_x) for layer in layers for of_x in _products(settings, model, layer).values())
    return ModelCost(
        parameters=sum(np_parameters(settings, model, layer) for layer in layers),
        forward_flops_per_token=float(flops),
    )


def npt_work(
    settings: NPTModuleConfig, model: ModelConfig, objective: StepObjective, weights: Mapping[int, float]
) -> StepWork:
    """Describes the parts of the model that a training step runs and trains.

    Args:
        settings: NPT's configuration.
        model: configuration of the base model.
        objective: the losses and the curriculum stage of the step.
        weights: maps the index of each trained NPT layer to the weight of its losses.
    """
    if objective.layer_parallel:
        return _layer_parallel_work(settings, model, weights)
    converted = settings.layers(model.num_layers)
    uses, flops, reached = [], 0.0, not settings.freeze_base
    for number in range(model.num_layers):
        if number not in converted:
            uses.append(_plain_use(settings, reached))
            continue
        trains = number in weights
        layer = gradients_of(settings, objective, reached, trains)
        uses.append(layer.use)
        flops += _np_flops(settings, model, number, layer) + _base_flops(model, layer, settings.has_gain)
        if trains and weights[number] and objective.layer.compares_outputs:
            flops += mlp_flops_per_token(model) + _local_flops(settings, model, objective, number, layer)
        reached = reached or trains
    reads = objective.lm > 0 or objective.fidelity > 0
    return StepWork(
        layers=tuple(uses),
        head=_plain_use(settings, True),
        trains_embedding=not settings.freeze_base,
        head_forwards=reads + (objective.fidelity > 0),
        further_forwards=int(objective.reads_teacher),
        trained_parameters=sum(np_parameters(settings, model, number) for number in weights),
        flops_per_token=flops,
    )


def _layer_parallel_work(
    settings: NPTModuleConfig, model: ModelConfig, weights: Mapping[int, float]
) -> StepWork:
    alone = LayerGradients(use=Use.PARTIAL, trains=True, to_attention=False, to_mlp=False)
    base = mlp_flops_per_token(model) + _base_flops(model, alone, settings.has_gain)
    end = max(weights) + 1
    return StepWork(
        layers=(Use.FORWARD,) * end + (Use.SKIPPED,) * (model.num_layers - end),
        head=Use.FORWARD,
        trains_embedding=False,
        head_forwards=0,
        trained_parameters=sum(np_parameters(settings, model, number) for number in weights),
        flops_per_token=sum(base + _np_flops(settings, model, number, alone) for number in weights),
    )


@dataclass(frozen=True, kw_only=True)
class LayerGradients:
    """The gradients that a training step computes in one NPT layer."""

    use: Use
    """The parts of the layer that the step computes."""

    trains: bool
    """Whether the layer's NP components train."""

    to_attention: bool
    """Whether the attention's input needs a gradient."""

    to_mlp: bool
    """Whether the MLP's input needs a gradient."""

    @property
    def any(self) -> bool:
        """Whether the layer computes any gradient."""
        return self.trains or self.to_attention or self.to_mlp


def gradients_of(
    settings: NPTModuleConfig, objective: StepObjective, reached: bool, trains: bool
) -> LayerGradients:
    """Returns the gradients that a layer computes; `reached` means that a trained layer lies below it."""
    # The input of an NPT layer that is not trained is always the student's hidden state; see `NPTFamily.begin_step`.
    stage = objective.stage
    to_attention = reached and (not trains or stage.attention_share > 0)
    to_mlp = reached and (not trains or stage.mlp_share > 0)
    if not settings.freeze_base:
        return LayerGradients(use=Use.TRAINED, trains=trains, to_attention=True, to_mlp=True)
    if to_attention and to_mlp:
        use = Use.GRADIENT
    else:
        use = Use.PARTIAL if trains or to_attention or to_mlp else Use.FORWARD
    return LayerGradients(use=use, trains=trains, to_attention=to_attention, to_mlp=to_mlp)


def _plain_use(settings: NPTModuleConfig, reached: bool) -> Use:
    if not settings.freeze_base:
        return Use.TRAINED
    return Use.GRADIENT if reached else Use.FORWARD


def _base_flops(model: ModelConfig, layer: LayerGradients, has_gain: bool) -> float:
    """Returns the backward FLOPs per token of a PARTIAL layer's base weights: fc2, and all parts that need
    gradients.
    """
    if layer.use is not Use.PARTIAL:
        return 0.0
    fc1, fc2 = (linear_flops_per_token(model, name) for name in ("fc1", "fc2"))
    attention = linear_flops_per_token(model, "qkv", "proj") + 2 * core_attention_flops_per_token(model)
    # In key_value, the input of fc1 depends on the factors and on the attention output.
    to_fc1 = layer.to_mlp or has_gain
    return fc2 + fc1 * to_fc1 + attention * layer.to_attention


def _local_flops(
    settings: NPTModuleConfig,
    model: ModelConfig,
    objective: StepObjective,
    number: int,
    layer: LayerGradients,
) -> float:
    """Returns the FLOPs per token of running a layer's modulated MLP again on detached inputs, for local losses."""
    if not objective.layer.local or not (layer.to_attention or layer.to_mlp):
        return 0.0
    mlp = mlp_flops_per_token(model)
    if layer.use is Use.TRAINED:
        # The norm's weights train too, so the MLP's input needs a gradient.
        backward, again = 2 * mlp, replace(layer, to_attention=False)
    else:
        # In key_value, the input of fc1 depends on the factors.
        backward = mlp if settings.has_gain else linear_flops_per_token(model, "fc2")
        again = replace(layer, to_attention=False, to_mlp=False)
    return mlp + backward + _np_flops(settings, model, number, again)


def _np_flops(settings: NPTModuleConfig, model: ModelConfig, number: int, layer: LayerGradients) -> float:
    """Returns the FLOPs per token of a layer's NP components, forward and backward."""
    total = 0
    for target, (of_input, of_attention, of_output) in _products(settings, model, number).items():
        input_has_gradient = layer.any if target == "down" else layer.to_mlp
        total += (1 + layer.trains) * (of_input + of_attention + of_output)
        total += of_input * input_has_gradient + of_attention * layer.to_attention + of_output * layer.any
    return float(total)


def _products(settings: NPTModuleConfig, model: ModelConfig, number: int) -> dict[str, tuple[int, int, int]]:
    """Maps each target to the forward FLOPs per token of its products with x, with a, and with u."""
    found = {}
    for target in settings.targets:
        rank = settings.num_np_components * settings.rank(number, target, model.num_layers)
        inner, outer = _sizes(settings, target, model)
        affine = settings.num_np_components * inner * settings.has_affine
        reads = 0 if settings.np_form == "key_value" else 2 * (rank * inner + affine)
        found[target] = (reads, 2 * rank * model.hidden_size, 2 * rank * outer)
    return found


def np_parameters(settings: NPTModuleConfig, model: ModelConfig, layer: int) -> int:
    """Returns the number of parameters of the NP components of one layer."""
    parameters = 0
    for target in settings.targets:
        rank = settings.num_np_components * settings.rank(layer, target, model.num_layers)
        inner, outer = _sizes(settings, target, model)
        # low_rank has one factor for x and a, except on `down`; key_value has no factor for x.
        shares = settings.np_form == "low_rank" and target != "down"
        reads = 0 if settings.np_form == "key_value" else inner
        codes = 0 if shares else model.hidden_size
        affine = settings.num_np_components * inner * settings.has_affine
        parameters += rank * (reads + outer + codes) + affine
    return parameters


def _sizes(settings: NPTModuleConfig, target: str, model: ModelConfig) -> tuple[int, int]:
    """Returns the input size of a target's weight matrix, and the output size of its factors."""
    if settings.np_form == "key_value":
        return model.hidden_size, model.hidden_size
    widths = (model.hidden_size, model.resolved_ffn_hidden_size)
    return widths[::-1] if target == "down" else widths
