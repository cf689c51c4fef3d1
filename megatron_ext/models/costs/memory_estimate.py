"""Estimates the memory of each rank: parameters, gradients, optimizer state and activations.

Bytes per parameter, with D data-parallel ranks:

              parameters  gradients  AdamW            AdamW, distributed optimizer
    fp32      4           4          8                8 / D
    bf16      2           4          4 + 8            (4 + 8) / D          (fp32 main weights, two moments)
    fp16      2           2          4 + 8            (4 + 8) / D          (the same)

--grad-reduce-in-bf16 halves the gradients of bf16, --accumulate-allreduce-grads-in-fp32 doubles those of fp16.

Frozen parameters have no gradients and no optimizer state; they count in the run's precision, even if a model
family quantizes them. Activations are the tensors that this engine's layers save for the backward pass; see
`layer_activation_bytes`. With the 1F1B schedule stage i of P holds the activations of up to P - i micro-batches at
once. With the interleaved schedule and v chunks per stage these are 2 (P - i - 1) + (v - 1) P + 1 passes of one chunk.
Without full recomputation a layer that no gradient reaches saves nothing, and a layer with frozen weights counts as if
its weights were trained.
Not included: temporary tensors inside an operation, fragmentation of the allocator, communication buffers, and the
activations of model families. Leave a margin for them.
"""

from dataclasses import dataclass

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.build_model import padded_vocab_size
from megatron_ext.models.costs.model_cost import (
    attention_width,
    embedding_parameters,
    layer_parameters,
    norm_parameters,
    qkv_width,
)
from megatron_ext.models.costs.step_work import StepWork, Use


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

    @property
    def total_bytes(self) -> float:
        """Sum of parameters, gradients, optimizer state and activations."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The settings of a run on which its memory depends."""

    model: ModelConfig
    parallel: ParallelConfig
    vocab_size: int
    """The tokenizer's vocabulary size, before padding."""

    micro_batch_size: int
    num_microbatches: int
    """Micro-batches per step on one data-parallel rank."""

    data_parallel_size: int
    bf16: bool = False
    fp16: bool = False

    work: StepWork | None = None
    """Which parts of the base model a step runs and trains; None if everything trains."""

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank, with context parallelism taken into account."""
        return self.micro_batch_size * self.model.seq_length // self.parallel.context_parallel_size

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation value or parameter."""
        return 2 if self.is_half else 4

    @property
    def is_half(self) -> bool:
        """Whether weights and activations are in bfloat16 or fp16."""
        return self.bf16 or self.fp16

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one gradient."""
        return 4 if self.parallel.reduces_in_fp32(bf16=self.bf16) else self.element_bytes

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the word embedding, after padding of the vocabulary."""
        return padded_vocab_size(self.vocab_size, self.model, self.parallel.tensor_model_parallel_size)

    @property
    def chunks(self) -> int:
        """Model chunks per rank: more than 1 with the interleaved schedule."""
        return self.parallel.virtual_pipeline_size(self.model.num_layers) or 1

    @property
    def layers_per_chunk(self) -> int:
        """Number of layers per chunk."""
        return self.model.num_layers // self.parallel.pipeline_model_parallel_size // self.chunks

    def layers_of(self, stage: int, least: Use) -> int:
        """Returns the number of layers, over all chunks of a stage, whose `Use` is at least `least`."""
        if self.work is None:
            return self.chunks * self.layers_per_chunk
        stages, size = self.parallel.pipeline_model_parallel_size, self.layers_per_chunk
        # The interleaved schedule assigns chunks to stages in turn.
        firsts = [(chunk * stages + stage) * size for chunk in range(self.chunks)]
        return sum(use >= least for first in firsts for use in self.work.layers[first : first + size])


def estimate_memory(
    layout: ParallelLayout, family_parameters: int = 0, trained_family_parameters: int | None = None
) -> list[StageMemory]:
    """Estimates the memory of one rank on every pipeline stage.

    Args:
        layout: the run's settings.
        family_parameters: number of parameters that all model families add to the whole model; assumed to be spread
            evenly over tensor-parallel ranks and stages.
        trained_family_parameters: number of these parameters that are trained; None for all.

    Returns:
        One entry per stage, from first to last.
    """
    parallel = layout.parallel
    stages = parallel.pipeline_model_parallel_size
    if trained_family_parameters is None:
        trained_family_parameters = family_parameters
    family, trained_family = (
        -(-number // (parallel.tensor_model_parallel_size * stages))
        for number in (family_parameters, trained_family_parameters)
    )
    shards = (
        layout.data_parallel_size * parallel.context_parallel_size
        if parallel.use_distributed_optimizer
        else 1
    )
    result = []
    for stage in range(stages):
        parameters = stage_parameters(layout, stage) + family
        trained = stage_parameters(layout, stage, trained=True) + trained_family
        result.append(
            StageMemory(
                parameters=parameters,
                trained_parameters=trained,
                parameter_bytes=parameters * layout.element_bytes,
                gradient_bytes=float(layout.gradient_bytes * trained),
                optimizer_bytes=(12.0 if layout.is_half else 8.0) * trained / shards,
                activation_bytes=stage_activation_bytes(layout, stage),
            )
        )
    return result


def stage_parameters(layout: ParallelLayout, stage: int, *, trained: bool = False) -> int:
    """Returns how many parameters of the base model one rank of a stage holds.

    If word embedding and output layer share their weights, a single stage holds them once; with several stages the last
    one holds a copy.

    Args:
        layout: the run's settings.
        stage: index of the stage, from 0.
        trained: whether to count only the parameters that train.
    """
    model, tensor = layout.model, layout.parallel.tensor_model_parallel_size
    stages = layout.parallel.pipeline_model_parallel_size
    work = layout.work if trained else None
    layers = layout.layers_of(stage, Use.TRAINED if trained else Use.SKIPPED)
    parameters = layers * layer_parameters(model, tensor)
    if stage == 0 and (work is None or work.trains_embedding):
        parameters += embedding_parameters(model, layout.padded_vocab, tensor)
    if stage == stages - 1 and (work is None or work.head is Use.TRAINED):
        parameters += norm_parameters(model, model.hidden_size)
        if model.untie_embeddings_and_output_weights or stages > 1:
            parameters += layout.padded_vocab * model.hidden_size // tensor
    return parameters


def stage_activation_bytes(layout: ParallelLayout, stage: int) -> float:
    """Returns the largest number of activation bytes that one rank of a stage holds at once."""
    model, parallel = layout.model, layout.parallel
    sequence_split = _sequence_split(parallel)
    in_flight = _chunks_in_flight(layout, stage)
    layer = layer_activation_bytes(layout)
    layer_input = layout.tokens * model.hidden_size * layout.element_bytes / sequence_split
    if parallel.recompute_granularity != "full":
        total = in_flight * layout.layers_of(stage, Use.PARTIAL) / layout.chunks * layer
    else:
        group = parallel.recompute_num_layers or 1
        # `kept` counts the inputs of the recomputed layers; `again`, the layers that are recomputed at one time.
        if parallel.recompute_method == "uniform":
            kept, again = -(-layout.layers_per_chunk // group) * layer_input, group * layer
        else:
            recomputed = min(group, layout.layers_per_chunk)
            kept, again = recomputed * layer_input + (layout.layers_per_chunk - recomputed) * layer, layer
        total = in_flight * kept + again
    if stage == 0 and model.hidden_dropout > 0:
        # The embedding's dropout mask, one byte per value; only one of the stage's chunks has it.
        total += in_flight / layout.chunks * layout.tokens * model.hidden_size / sequence_split
    if stage == parallel.pipeline_model_parallel_size - 1:
        total += head_activation_bytes(layout)
    return total


def layer_activation_bytes(layout: ParallelLayout) -> float:
    """Returns the bytes that one layer on one rank saves for the backward pass of one micro-batch.

    Full recomputation is not taken into account. A layer saves these values per token (letters as in `model_cost`):
    inputs and outputs of the two norms (4h); output of the fused query-key-value projection ((n + 2g) d); queries and
    keys again if they are rotated or normalized ((n + g) d, and n d more for grouped queries that are normalized);
    attention output (n d); the MLP's inner tensors (GELU: 2f, SwiGLU: 3f); dropout masks of one byte per value (as on
    a GPU). With C context-parallel ranks a rank keeps all keys and values (2 C g d per token of its own). Unfused core
    attention adds its scores (n s): in fp32, a second time in bf16 and fp16 runs, and twice with dropout.
    """
    model, parallel = layout.model, layout.parallel
    size, tensor = layout.element_bytes, parallel.tensor_model_parallel_size
    again = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    norms = 2 * model.hidden_size * (1 if "layernorm" in again else 2)
    whole = norms * size + 2 * model.hidden_size * (model.hidden_dropout > 0)
    attention = (
        _context_attention_width(layout) if parallel.context_parallel_size > 1 else _attention_width(model)
    )
    if model.qk_layernorm and model.resolved_num_query_groups < model.num_attention_heads:
        attention += attention_width(model)  # grouped queries are copied out of the projection's output
    mlp = 0 if "mlp" in again else (3 if model.swiglu else 2) * model.resolved_ffn_hidden_size
    shared = float((attention + mlp) * size)
    if model.attention_backend == "local" and "core_attn" not in again:
        shared += _score_bytes(layout)
    return layout.tokens * (whole / _sequence_split(parallel) + shared / tensor)


def _attention_width(model: ModelConfig) -> int:
    """Returns the number of values per token that attention saves, without context parallelism."""
    width = qkv_width(model) + attention_width(model)
    if model.position_embedding_type == "rope" or model.qk_layernorm:
        width += (qkv_width(model) + attention_width(model)) // 2
    return width


def _context_attention_width(layout: ParallelLayout) -> int:
    """Returns the number of values per token of this rank that attention saves under context parallelism."""
    model, ranks = layout.model, layout.parallel.context_parallel_size
    rotates = model.position_embedding_type == "rope"
    keys_and_values = qkv_width(model) - attention_width(model)
    # The keys and values of all ranks, and the outputs of the two chunks, which are then joined.
    width = ranks * keys_and_values + 2 * attention_width(model)
    if rotates or model.qk_layernorm:
        width += attention_width(model)  # the queries
    if model.qk_layernorm or not rotates:
        width += qkv_width(model)  # the projection's output, which a rotation does not keep
    return width


def head_activation_bytes(layout: ParallelLayout) -> float:
    """Returns the bytes that final norm, logits and loss save for the backward pass of one micro-batch."""
    hidden = 2 * layout.model.hidden_size * layout.element_bytes / _sequence_split(layout.parallel)
    # The logits in the run's precision, and the softmax for the backward pass: megatron-core's is in fp32, the one of
    # `cross_entropy` (without tensor parallelism) in the run's precision.
    ranks = layout.parallel.tensor_model_parallel_size
    softmax = 4 if ranks > 1 else layout.element_bytes
    return layout.tokens * (hidden + (layout.element_bytes + softmax) * layout.padded_vocab / ranks)


def _score_bytes(layout: ParallelLayout) -> float:
    model, size = layout.model, layout.element_bytes
    for_each = 4 + size * layout.is_half + (1 + size) * (model.attention_dropout > 0)
    return for_each * model.num_attention_heads * model.seq_length


def _sequence_split(parallel: ParallelConfig) -> int:
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1


def _chunks_in_flight(layout: ParallelLayout, stage: int) -> int:
    """Returns the largest number of forward passes that await their backward pass at the same time."""
    stages, chunks = layout.parallel.pipeline_model_parallel_size, layout.chunks
    if chunks == 1:
        return min(layout.num_microbatches, stages - stage)
    warmup = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return min(layout.num_microbatches * chunks, warmup + 1)
