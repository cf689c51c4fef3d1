"""Estimates the memory of each rank: parameters, gradients, optimizer state and activations.

Bytes per parameter, with D data-parallel ranks:

              parameters  gradients  AdamW            AdamW, distributed optimizer
    fp32      4           4          8                8 / D
    bf16      2           4          4 + 8            (4 + 8) / D          (fp32 main weights, two moments)
    fp16      2           2          4 + 8            (4 + 8) / D          (the same)

--grad-reduce-in-bf16 halves the bytes of gradients in bf16; --accumulate-allreduce-grads-in-fp32 doubles them in
fp16.

If a model family's own optimizer trains parameters, the family gives the bytes of their optimizer state, and their
gradients count as temporary tensors. Frozen parameters have no gradients and no optimizer state; they count in the
run's precision, or in the precision in which a model family stores them. For activations, see `activation_memory`.
Temporary tensors belong to the loss, to the backward pass of a layer, and to model families. Fragmentation of the
allocator and communication buffers are not included; leave a margin for them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_ext.models.costs.activation_memory import (
    FamilyActivations,
    ParallelLayout,
    stage_activation_bytes,
    stage_temporary_bytes,
)
from megatron_ext.models.costs.gemma3n_cost import parameters_of_end
from megatron_ext.models.costs.model_cost import embedding_parameters, layer_parameters, norm_parameters
from megatron_ext.models.costs.step_work import Use


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Estimated memory of one rank on a pipeline stage."""

    parameters: int
    """Number of parameters on the rank."""

    trained_parameters: int
    """Number of these parameters that are trained."""

    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    temporary_bytes: float

    @property
    def kept_bytes(self) -> float:
        """Sum of parameters, gradients, optimizer state and activations."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def peak_bytes(self) -> float:
        """Sum of all entries, temporary tensors included."""
        return self.kept_bytes + self.temporary_bytes


def estimate_memory(
    layout: ParallelLayout,
    family_parameters: int = 0,
    trained_family_parameters: int | None = None,
    activations: Sequence[FamilyActivations] = (),
) -> list[StageMemory]:
    """Estimates the memory of one rank on every pipeline stage.

    Args:
        layout: the run's settings.
        family_parameters: number of parameters that all model families add to the whole model; assumed to be spread
            evenly over tensor-parallel ranks and layers.
        trained_family_parameters: number of these parameters that the engine's optimizer trains; None for all.
        activations: activations that the model families add.

    Returns:
        One entry per stage, from first to last.
    """
    parallel = layout.parallel
    stages = parallel.pipeline_model_parallel_size
    if trained_family_parameters is None:
        trained_family_parameters = family_parameters
    shards = (
        layout.data_parallel_size * parallel.context_parallel_size
        if parallel.use_distributed_optimizer
        else 1
    )
    result = []
    for stage in range(stages):
        of_layers = len(layout.stage_layers(stage))
        family, trained_family = (
            -(-number * of_layers // (parallel.tensor_model_parallel_size * layout.model.num_layers))
            for number in (family_parameters, trained_family_parameters)
        )
        parameters = stage_parameters(layout, stage) + family
        trained = stage_parameters(layout, stage, trained=True) + trained_family
        stored = _stage_sum(layout, stage, (family.weights for family in activations))
        state = _stage_sum(layout, stage, (family.state for family in activations))
        at_most = _stage_sum(layout, stage, (family.at_most for family in activations))
        result.append(
            StageMemory(
                parameters=parameters,
                trained_parameters=trained,
                parameter_bytes=parameters * layout.element_bytes + stored,
                gradient_bytes=float(layout.gradient_bytes * trained),
                optimizer_bytes=(12.0 if layout.is_half else 8.0) * trained / shards + state,
                activation_bytes=stage_activation_bytes(layout, stage, activations),
                temporary_bytes=stage_temporary_bytes(layout, stage, activations) + at_most,
            )
        )
    return result


def _stage_sum(layout: ParallelLayout, stage: int, of_families: Iterable[tuple[float, ...]]) -> float:
    """Returns the sum over all families and a stage's layers; a family's tuple has one entry per layer, or is empty."""
    numbers = layout.stage_layers(stage)
    return sum(of_layers[number] for of_layers in of_families if of_layers for number in numbers)


def stage_parameters(layout: ParallelLayout, stage: int, *, trained: bool = False) -> int:
    """Returns the number of parameters of the base model that one rank of a stage holds.

    Shared weights of word embedding and output layer count once with a single stage; with several stages, the last
    stage holds a copy.

    Args:
        layout: the run's settings.
        stage: index of the stage, from 0.
        trained: whether to count only the parameters that train.
    """
    model, tensor = layout.model, layout.parallel.tensor_model_parallel_size
    stages = layout.parallel.pipeline_model_parallel_size
    work = layout.work if trained else None
    least = Use.TRAINED if trained else Use.SKIPPED
    layers = [layer for layer in layout.stage_layers(stage) if layout.use(layer) >= least]
    parameters = sum(layer_parameters(model, tensor, layer) for layer in layers)
    if stage == 0 and (work is None or work.trains_embedding):
        parameters += embedding_parameters(model, layout.padded_vocab, tensor) + parameters_of_end(model)
    if stage == stages - 1 and (work is None or work.head is Use.TRAINED):
        parameters += norm_parameters(model, model.hidden_size) + parameters_of_end(model)
        if model.untie_embeddings_and_output_weights or stages > 1:
            parameters += layout.padded_vocab * model.hidden_size // tensor
    return parameters
