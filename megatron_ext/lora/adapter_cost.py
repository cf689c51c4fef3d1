"""Counts the parameters and FLOPs of LoRA adapters, and the computation and memory of a step with frozen layers.

    LoRA adapters of total rank r                  r (input + output)     parameters, for each of a layer's four linears
                                                   2 r (input + output)   forward FLOPs per token, for each of them

The computation of a training step in a layer depends on the parts that train:

    layer                                     computed in a training step
    trained                                   forward, gradients of inputs and weights
    frozen, above something that trains       forward and input gradients
    frozen, above nothing that trains         forward only; nothing if it is cached
    only adapters train                       forward, input gradients, the adapters' gradients; in the lowest such
                                              layer, above a frozen embedding, no input gradients of qkv

A layer saves the following numbers of values per token for the backward pass, in addition to those of a base layer. h
is the hidden size (divided by the tensor-parallel size t under sequence parallelism). n d is the width of all query
heads, f the MLP's width (both divided by t).

    trained adapters on frozen weights    2 h + f         inputs of the four linears (a frozen layer saves none)
                                          r per linear    products of these inputs with A
    trained in another precision          2 h (undivided) + n d + f, in that precision; without adapters, these
                                          replace 2 h + f

Unpacking four-bit weights is not a matrix product and is not counted.
"""

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.lora.four_bit_weights import is_packed
from megatron_ext.lora.linear_precision import compute_dtype
from megatron_ext.lora.parallel_linear import LayerSettings, SettingsByLayer
from megatron_ext.models.costs.activation_memory import (
    FamilyActivations,
    ParallelLayout,
    layer_activation_bytes,
)
from megatron_ext.models.costs.model_cost import (
    attention_width,
    core_attention_flops_per_token,
    linear_flops_per_token,
    linear_sizes,
)
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.models.engine_config import DTYPES

_FOUR_BITS = 0.5625
"""Bytes per four-bit weight, with the scales of their blocks."""


def adapter_parameters(plan: SettingsByLayer, model: ModelConfig) -> int:
    """Returns the number of parameters of all adapters; each costs two FLOPs per token in a forward pass.

    Args:
        plan: trained parts, adapters and precision of each layer, by layer number.
        model: configuration of the base model.
    """
    return sum(_adapter_parameters(settings, model, number) for number, settings in plan.items())


def adapted_work(
    plan: SettingsByLayer, model: ModelConfig, *, trains_embedding: bool, cached_layers: int = 0
) -> StepWork:
    """Describes the parts of the model that a training step runs and trains. The head (output layer) always trains.

    Args:
        plan: trained parts, adapters and precision of each layer, by layer number.
        model: configuration of the base model.
        trains_embedding: whether anything below the first layer is trained.
        cached_layers: number of layers at the start of the model that do not run.
    """
    uses, trained, flops, reached = [], 0, 0.0, trains_embedding
    for number in range(model.num_layers):
        settings = plan[number]
        use = _use(settings, reached) if number >= cached_layers else Use.SKIPPED
        uses.append(use)
        trained += _adapter_parameters(settings, model, number) * bool(settings.trained_adapters)
        flops += _adapter_flops(settings, model, number, use)
        if use is Use.PARTIAL:
            backward = linear_flops_per_token(model, layer=number) + 2 * core_attention_flops_per_token(
                model, number
            )
            flops += backward - linear_flops_per_token(
                model, "qkv", layer=number
            )  # the layer's input needs no gradient
        reached = reached or use >= Use.PARTIAL
    return StepWork(
        layers=tuple(uses),
        trains_embedding=trains_embedding,
        trained_parameters=trained,
        flops_per_token=flops,
    )


def adapted_activations(plan: SettingsByLayer, layout: ParallelLayout) -> FamilyActivations:
    """Returns the bytes that adapters and precisions add to the activations of a training step.

    Args:
        plan: trained parts, adapters and precision of each layer, by layer number.
        layout: the run's sizes and parallel layout; its `work` says which layers a step runs and trains.
    """
    count = layout.model.num_layers
    none = (0.0,) * count
    layers = tuple(_layer_bytes(plan[number], layout, number) for number in range(count))
    weights = tuple(_stored_bytes(plan[number], layout, number) for number in range(count))
    return FamilyActivations(layers=layers, streams=none, held=none, weights=weights)


def _stored_bytes(settings: LayerSettings, layout: ParallelLayout, number: int) -> float:
    """Returns the bytes of a layer's frozen matrices minus their bytes in the run's precision."""
    if settings.trains_base:
        return 0.0  # fp32 weights need no main weights, so the sum is the same
    run_dtype = DTYPES[layout.precision]
    dtype = compute_dtype(settings.precision, run_dtype)
    size = _FOUR_BITS if is_packed(settings.precision) else dtype.itemsize
    matrices = sum(inner * outer for inner, outer in linear_sizes(layout.model, number).values())
    return matrices / layout.parallel.tensor_model_parallel_size * (size - layout.element_bytes)


def _layer_bytes(settings: LayerSettings, layout: ParallelLayout, number: int) -> float:
    """Returns the bytes of activations that a layer saves in addition to those of a base layer.

    For `Use.PARTIAL`, returns the bytes of all activations that the layer saves.
    """
    adapters, use = bool(settings.trained_adapters), layout.use(number)
    products = (
        layout.tokens * len(linear_sizes(layout.model)) * _rank(settings) * layout.element_bytes * adapters
    )
    if use is Use.PARTIAL:
        # The input of the lowest norm needs no gradient, so it is not saved.
        return layer_activation_bytes(layout, layer=number) - layout.hidden_bytes + products
    inputs = 2 * layout.hidden_bytes + layout.ffn_bytes_of(number)
    if use is Use.GRADIENT:
        return products + inputs * adapters
    run_dtype = DTYPES[layout.precision]
    dtype = compute_dtype(settings.precision, run_dtype)
    if use is not Use.TRAINED or dtype is run_dtype:
        return products
    model, tensor = layout.model, layout.parallel.tensor_model_parallel_size
    split = attention_width(model, number) + model.layers[number].ffn_hidden_size
    cast = layout.tokens * (2 * model.hidden_size + split / tensor) * dtype.itemsize
    return products + cast - inputs * (not adapters)


def _use(settings: LayerSettings, reached: bool) -> Use:
    if settings.trains_base:
        return Use.TRAINED
    if reached:
        return Use.GRADIENT
    return Use.PARTIAL if settings.trained_adapters else Use.FORWARD


def _adapter_flops(settings: LayerSettings, model: ModelConfig, number: int, use: Use) -> float:
    """Returns the FLOPs per token of a layer's adapters, forward and backward."""
    if use is Use.SKIPPED:
        return 0.0
    rank, trains = _rank(settings), bool(settings.trained_adapters)
    total = 0
    for name, (inner, outer) in linear_sizes(model, number).items():
        input_has_gradient = use > Use.PARTIAL or (use is Use.PARTIAL and name != "qkv")
        total += rank * (inner + outer) * (1 + trains)
        total += rank * (inner * input_has_gradient + outer * (trains or input_has_gradient))
    return 2.0 * total


def _adapter_parameters(settings: LayerSettings, model: ModelConfig, number: int) -> int:
    return _rank(settings) * sum(inner + outer for inner, outer in linear_sizes(model, number).values())


def _rank(settings: LayerSettings) -> int:
    return sum(shape.rank for shape in settings.adapters.values())
