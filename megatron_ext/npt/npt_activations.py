"""Counts the activations that NPT adds on a rank: tensors of its layers and their losses, and the teacher's states.

Values per token that an NPT layer keeps for its NP components, with the hidden size h divided under sequence
parallelism and f divided by t:

    n                 h         the MLP's normed input, by which factors are multiplied; a trained base keeps it anyway
    a                 h         the attention output, which replaces the input of a second norm
    activation        f         with a delta of `down`: the input of `down`; a trained base keeps it anyway
    coefficients      r each    per target; low_rank: 4, outer_product: 3 and 2 more in fp32, key_value: 3
    loss              h fp32    the error of the MLP's output; 2 h more for a cosine
    local losses      n, the MLP's inner tensor and the coefficients a second time, if the inputs have gradients

The teacher's inputs to the layers (h per layer) are fields of a batch and are also packed into a stream; under
pipeline parallelism, the fields of all micro-batches are held at the same time. The fidelity loss holds the logits in
fp32 (twice if there is more than one sequence), their gradient in fp32, the teacher's logits, and three blocks of fp32
values.
"""

from collections.abc import Mapping

from megatron_ext.models.costs.activation_memory import (
    FamilyActivations,
    ParallelLayout,
    attention_activation_bytes,
    mlp_backward_bytes,
)
from megatron_ext.models.costs.step_work import Use
from megatron_ext.models.ops.cross_entropy import BLOCK_BYTES
from megatron_ext.npt.modules.npt_module_config import NPTModuleConfig
from megatron_ext.npt.npt_cost import LayerGradients, gradients_of
from megatron_ext.npt.objective.step_objective import StepObjective


def npt_activations(
    settings: NPTModuleConfig,
    layout: ParallelLayout,
    objective: StepObjective,
    weights: Mapping[int, float],
    fidelity_loss: str = "kl",
) -> FamilyActivations:
    """Returns the bytes that NPT adds to the activations of a training step.

    Args:
        settings: NPT's configuration.
        layout: the run's settings that determine its memory.
        objective: the losses and the curriculum stage of the step.
        weights: maps the index of each trained NPT layer to the weight of its losses.
        fidelity_loss: the measure of fidelity, `kl` or `mse`.
    """
    count = layout.model.num_layers
    if objective.layer_parallel:
        return _layer_parallel(settings, layout, objective, weights)
    layers, streams, held = ([0.0] * count for _ in range(3))
    reached = not settings.freeze_base
    for number in settings.layers(count):
        trains = number in weights
        gradients = gradients_of(settings, objective, reached, trains)
        layers[number] = _layer_bytes(settings, layout, number, gradients)
        if trains and weights[number]:
            layers[number] += _loss_bytes(settings, layout, objective, number, gradients)
        if objective.stage.blends:
            streams[number] = layout.hidden_bytes
            held[number] = layout.hidden_bytes * _stored_batches(layout)
        reached = reached or trains
    compares = any(weights.values()) and objective.layer.compares_outputs
    return FamilyActivations(
        layers=tuple(layers),
        streams=tuple(streams),
        held=tuple(held),
        head=_fidelity_bytes(layout, objective, fidelity_loss) if objective.fidelity else 0.0,
        transient=_comparison_bytes(layout) if compares else 0.0,
    )


def _layer_parallel(
    settings: NPTModuleConfig, layout: ParallelLayout, objective: StepObjective, weights: Mapping[int, float]
) -> FamilyActivations:
    """Returns the bytes of layer-parallel training: the teacher's three states per trained layer, and the needs of
    one layer at a time.
    """
    count, states = layout.model.num_layers, 3 * layout.hidden_bytes * _stored_batches(layout)
    alone = LayerGradients(use=Use.PARTIAL, trains=True, to_attention=False, to_mlp=False)
    of_one = max(
        _layer_bytes(settings, layout, number, alone)
        + _loss_bytes(settings, layout, objective, number, alone)
        for number in weights
    )
    return FamilyActivations(
        layers=(0.0,) * count,
        streams=(0.0,) * count,
        held=tuple(states * (number in weights) for number in range(count)),
        transient=of_one + _comparison_bytes(layout),
    )


def _stored_batches(layout: ParallelLayout) -> int:
    """Returns the number of micro-batches for which the teacher's states are stored at the same time."""
    return layout.num_microbatches if layout.parallel.pipeline_model_parallel_size > 1 else 1


def _layer_bytes(
    settings: NPTModuleConfig, layout: ParallelLayout, number: int, gradients: LayerGradients
) -> float:
    """Returns the bytes that an NPT layer keeps for the backward pass beyond those of a base layer; for `Use.PARTIAL`,
    all bytes that it keeps.
    """
    if not gradients.any:
        return 0.0
    hidden = layout.hidden_bytes
    extra = _coefficient_bytes(settings, layout, number)
    if gradients.use is Use.TRAINED:
        return extra
    keeps_input = gradients.to_mlp or settings.np_form != "key_value"
    extra += hidden * keeps_input + layout.ffn_bytes * _reads_activation(settings)
    if gradients.use is Use.GRADIENT:
        return extra
    extra += hidden * (1 + (gradients.to_attention or gradients.to_mlp)) + _inner_bytes(layout)
    return extra + attention_activation_bytes(layout) * gradients.to_attention


def _loss_bytes(
    settings: NPTModuleConfig,
    layout: ParallelLayout,
    objective: StepObjective,
    number: int,
    gradients: LayerGradients,
) -> float:
    """Returns the bytes that a layer's losses save: the errors and, for local losses, the MLP on detached inputs."""
    losses = objective.layer
    if not losses.compares_outputs:
        return 0.0
    cosine = losses.equivalence > 0 and losses.equivalence_loss == "cosine"
    extra = _wide_hidden_bytes(layout) * (1 + 2 * cosine)
    if losses.local and (gradients.to_attention or gradients.to_mlp):
        extra += layout.hidden_bytes + _inner_bytes(layout) + _coefficient_bytes(settings, layout, number)
        extra += layout.ffn_bytes * (_reads_activation(settings) or gradients.use is Use.TRAINED)
    return extra


def _comparison_bytes(layout: ParallelLayout) -> float:
    """Returns the bytes that the comparison of a layer's output with its target allocates in addition to an MLP's
    backward pass.
    """
    # The outputs, the target, and squares in fp32.
    compared = 5 * layout.hidden_bytes + 3 * _wide_hidden_bytes(layout)
    return max(0.0, compared - mlp_backward_bytes(layout))


def _fidelity_bytes(layout: ParallelLayout, objective: StepObjective, kind: str) -> float:
    """Returns the bytes that the fidelity loss holds in addition to the head's logits and to the cross-entropy's
    softmax (if any).
    """
    wide = 4 * layout.logit_count
    copies = 2 + (layout.micro_batch_size > 1)
    softmax = wide if layout.parallel.tensor_model_parallel_size > 1 else wide / 4 * layout.element_bytes
    # The mean square error is computed for one whole tensor, not in blocks.
    blocks = 3 * min(BLOCK_BYTES["cuda"], wide) if kind == "kl" else wide
    return copies * wide + blocks - (0.0 if objective.lm else softmax)


def _wide_hidden_bytes(layout: ParallelLayout) -> float:
    return layout.hidden_bytes * 4 / layout.element_bytes


def _inner_bytes(layout: ParallelLayout) -> float:
    """Returns the bytes of fc1's output, from which the derivative of the activation is computed."""
    return layout.ffn_bytes * (2 if layout.model.swiglu else 1)


def _reads_activation(settings: NPTModuleConfig) -> bool:
    return "down" in settings.targets and settings.np_form != "key_value"


def _coefficient_bytes(settings: NPTModuleConfig, layout: ParallelLayout, number: int) -> float:
    """Returns the bytes of the products of size r that a layer computes with its factors. The last of them, u, is held
    for the whole sequence, even under sequence parallelism.
    """
    ranks = sum(settings.rank(number, target, layout.model.num_layers) for target in settings.targets)
    size = layout.element_bytes
    # outer_product computes in fp32.
    of_form = {"low_rank": 3 * size, "outer_product": 8 + 2 * size, "key_value": 2 * size}
    width = of_form[settings.np_form] / layout.sequence_split + size
    return layout.tokens * settings.num_np_components * ranks * width
