"""Estimates the activations that one rank holds at the peak of a step, for the base model and the model families.

Activations are the tensors that this engine's layers save for the backward pass; see `layer_activation_bytes`. With the
1F1B schedule stage i of P holds the activations of up to P - i micro-batches at once. With the interleaved schedule
and v chunks per stage, it holds the activations of up to 2 (P - i - 1) + (v - 1) P + 1 passes of one chunk. A layer
that no gradient reaches saves nothing. At the peak, a stage also holds temporary tensors: of the loss (on the last
stage) or of the backward pass of a layer, whichever is larger.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.models.build_model import padded_vocab_size
from megatron_ext.models.costs.gemma3n_cost import end_activations, layer_activations
from megatron_ext.models.costs.model_cost import (
    attended_keys,
    attention_width,
    mean_over_layers,
    qkv_width,
)
from megatron_ext.models.costs.step_work import StepWork, Use
from megatron_ext.models.ops.cross_entropy import BLOCK_BYTES
from megatron_ext.models.ops.windowed_attention import block_size


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The settings of a run that determine its memory."""

    model: ModelConfig
    parallel: ParallelConfig
    vocab_size: int
    """The tokenizer's vocabulary size, before padding."""

    micro_batch_size: int
    num_microbatches: int
    """Micro-batches per step on one data-parallel rank."""

    data_parallel_size: int
    precision: Precision = "fp32"

    work: StepWork | None = None
    """The parts of the base model that a step runs and trains; None if everything trains."""

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
        return self.precision != "fp32"

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one gradient."""
        return 4 if self.parallel.reduces_in_fp32(self.precision) else self.element_bytes

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the word embedding, after padding of the vocabulary."""
        return padded_vocab_size(self.vocab_size, self.model, self.parallel.tensor_model_parallel_size)

    @property
    def sequence_split(self) -> int:
        """Number of ranks over which norms and residual stream are split: the tensor-parallel size under sequence
        parallelism, otherwise 1.
        """
        parallel = self.parallel
        return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1

    @property
    def hidden_bytes(self) -> float:
        """Bytes of the hidden states [s, b, h] of a micro-batch on one rank, [s/t, b, h] under sequence parallelism."""
        return self.tokens * self.model.hidden_size * self.element_bytes / self.sequence_split

    @property
    def residual_bytes(self) -> float:
        """Bytes of all residual streams of a micro-batch on one rank; without AltUp there is one."""
        return self.hidden_bytes * (self.model.altup_streams or 1)

    @property
    def ffn_bytes(self) -> float:
        """Bytes of the MLP's inner tensor [s, b, f/t] of a micro-batch on one rank, in the widest layer."""
        return max(map(self.ffn_bytes_of, range(self.model.num_layers)))

    def ffn_bytes_of(self, layer: int) -> float:
        """Returns the bytes of the inner tensor [s, b, f/t] of one layer's MLP."""
        width = self.model.layers[layer].ffn_hidden_size / self.parallel.tensor_model_parallel_size
        return self.tokens * width * self.element_bytes

    @property
    def logit_count(self) -> float:
        """Number of logits of a micro-batch on one rank."""
        return self.tokens * self.padded_vocab / self.parallel.tensor_model_parallel_size

    @property
    def chunks(self) -> int:
        """Model chunks per rank: more than 1 with the interleaved schedule."""
        return self.parallel.virtual_pipeline_size(self.model.num_layers) or 1

    def stage_layers(self, stage: int) -> list[int]:
        """Returns the numbers of a stage's layers, chunk by chunk."""
        return [layer for chunk in self.stage_chunks(stage) for layer in chunk]

    def stage_chunks(self, stage: int) -> list[range]:
        """Returns, for each of a stage's chunks, the numbers of its layers."""
        sizes = self.parallel.stage_sizes(self.model.num_layers)
        if self.chunks == 1:
            return [range(sum(sizes[:stage]), sum(sizes[: stage + 1]))]
        # The interleaved schedule assigns chunks to stages in turn.
        stages, size = len(sizes), sizes[stage] // self.chunks
        firsts = [(chunk * stages + stage) * size for chunk in range(self.chunks)]
        return [range(first, first + size) for first in firsts]

    def use(self, layer: int) -> Use:
        """Returns how a step uses a layer."""
        return Use.TRAINED if self.work is None else self.work.layers[layer]

    def layers_of(self, stage: int, least: Use) -> int:
        """Returns the number of layers, over all chunks of a stage, whose `Use` is at least `least`."""
        return sum(self.use(layer) >= least for layer in self.stage_layers(stage))


@dataclass(frozen=True, kw_only=True)
class FamilyActivations:
    """Bytes that a model family adds on a rank, mostly activations; each tuple has one entry per layer."""

    layers: tuple[float, ...]
    """Bytes that a layer saves per micro-batch in addition to the base layer's; full recomputation drops them. For a
    layer of `Use.PARTIAL`, all bytes that the layer saves.
    """

    streams: tuple[float, ...]
    """Bytes kept per micro-batch for a layer even under full recomputation."""

    held: tuple[float, ...]
    """Bytes held once for a layer, whatever the number of micro-batches in flight."""

    weights: tuple[float, ...] = ()
    """Bytes of a layer's weights minus their bytes in the run's precision, possibly negative; empty if all
    differences are 0.
    """

    state: tuple[float, ...] = ()
    """Bytes of optimizer state, including fp32 main weights, for the parameters of a layer that the model family's
    own optimizer trains (`ModelCost.trained_apart`); empty if there are none.
    """

    at_most: tuple[float, ...] = ()
    """Upper limit of the bytes that a step holds for a layer, if they depend on the data. They count as temporary;
    empty if there are none.
    """

    head: float = 0.0
    """Bytes that the family's own output loss adds to the head's activations on the last stage."""

    transient: float = 0.0
    """Bytes that the forward or backward pass of one layer allocates in addition to `mlp_backward_bytes`, while the
    activations of all other layers are kept.
    """


def stage_activation_bytes(
    layout: ParallelLayout, stage: int, families: Sequence[FamilyActivations] = ()
) -> float:
    """Returns the largest number of activation bytes that one rank of a stage holds at once."""
    kept, again = _kept_and_recomputed(layout, stage, families)
    return max(kept + max(again, _loss_bytes(layout, stage, families)), _evaluation_bytes(layout, stage))


def stage_temporary_bytes(
    layout: ParallelLayout, stage: int, families: Sequence[FamilyActivations] = ()
) -> float:
    """Returns the bytes that one rank of a stage allocates at the peak in addition to the activations."""
    kept, again = _kept_and_recomputed(layout, stage, families)
    at_loss = _loss_bytes(layout, stage, families)
    if at_loss and layout.parallel.tensor_model_parallel_size == 1:
        at_loss += 2 * min(BLOCK_BYTES["cuda"], 4 * layout.logit_count)
    in_layer = again
    if layout.layers_of(stage, Use.PARTIAL):
        in_layer += mlp_backward_bytes(layout) + sum(family.transient for family in families)
    peak = max(kept + max(at_loss, in_layer), _evaluation_bytes(layout, stage))
    return peak - stage_activation_bytes(layout, stage, families)


def _kept_and_recomputed(
    layout: ParallelLayout, stage: int, families: Sequence[FamilyActivations]
) -> tuple[float, float]:
    """Returns the bytes that a stage's layers keep until their backward pass, and the largest number of bytes that
    recomputation restores at a time.
    """
    model, parallel = layout.model, layout.parallel
    numbers, in_flight = layout.stage_layers(stage), _chunks_in_flight(layout, stage)
    per_chunk = len(numbers) // layout.chunks
    saved = [
        layer_activation_bytes(layout, layout.use(number), number)
        + sum(family.layers[number] for family in families)
        for number in numbers
    ]
    streams = sum(family.streams[number] for family in families for number in numbers)
    streams += shared_key_bytes(layout, stage)
    held = sum(family.held[number] for family in families for number in numbers)
    again = 0.0
    if parallel.recompute_granularity != "full":
        of_layers = sum(saved) / layout.chunks
    else:
        group = parallel.recompute_num_layers or 1
        if parallel.recompute_method == "uniform":
            of_layers = -(-per_chunk // group) * layout.residual_bytes
            again = group * max(saved)
        else:
            recomputed, again = min(group, per_chunk), max(saved)
            rest = (per_chunk - recomputed) / per_chunk
            of_layers = recomputed * layout.residual_bytes + rest * sum(saved) / layout.chunks
    kept = in_flight * (of_layers + streams / layout.chunks) + held
    if stage == 0:
        kept += in_flight / layout.chunks * end_activations(model, layout.hidden_bytes)
    if stage == 0 and model.hidden_dropout > 0:
        # The embedding's dropout mask takes one byte per value; only one of the stage's chunks has it.
        kept += in_flight / layout.chunks * layout.hidden_bytes / layout.element_bytes
    return kept, again


def _loss_bytes(layout: ParallelLayout, stage: int, families: Sequence[FamilyActivations]) -> float:
    """Returns the bytes that the output loss holds on a stage in a training step; 0 if the stage computes no loss."""
    is_last = stage == layout.parallel.pipeline_model_parallel_size - 1
    if not is_last or (layout.work is not None and not layout.work.head_forwards):
        return 0.0
    return head_activation_bytes(layout) + sum(family.head for family in families)


def _evaluation_bytes(layout: ParallelLayout, stage: int) -> float:
    """Returns the bytes that an evaluation holds on a stage for the loss, even if a training step computes no loss."""
    is_last = stage == layout.parallel.pipeline_model_parallel_size - 1
    return head_activation_bytes(layout) if is_last else 0.0


def layer_activation_bytes(layout: ParallelLayout, use: Use = Use.TRAINED, layer: int | None = None) -> float:
    """Returns the bytes that one layer on one rank saves for the backward pass of one micro-batch.

    Full recomputation is ignored. A layer saves these values per token (letters as in `model_cost`): inputs and
    outputs of the two norms (4h), inputs of sandwich norms (2h); output of the fused query-key-value projection ((n +
    2g) d); queries and keys again if they are rotated or normalized ((n + g) d, and n d more for grouped queries that
    are normalized); attention output (n d); the MLP's inner tensors (GELU: 2f, gated: 3f); dropout masks of one byte
    per value (as on a GPU). With C context-parallel ranks, each rank keeps all keys and values (2 C g d for each of
    its tokens). With a sliding window shorter than the sequence, attention keeps concatenated keys and values, and
    its output twice; with grouped queries, it also keeps the keys and values of each block of queries, once for every
    query head (as on a GPU). A layer that uses another layer's keys and values saves only its queries and rotated
    keys. Unfused core attention adds its n s scores: in fp32, in bf16 and fp16 runs also in that precision, and with
    dropout also the mask and the result of the dropout. A frozen layer does not keep the inputs of its matrices: the
    outputs of the norms (2h), and fc2's input (f).

    Args:
        layout: the run's settings.
        use: how a step uses the layer. For `Use.PARTIAL`, the model family counts the saved bytes.
        layer: number of the layer; None for the mean over all layers.
    """
    if use < Use.GRADIENT:
        return 0.0
    parallel, size = layout.parallel, layout.element_bytes
    again = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    is_frozen = use is Use.GRADIENT
    # The output of a norm is not kept if the norm is recomputed, and not needed by a frozen layer.
    whole = (2 if is_frozen or "layernorm" in again else 4) * layout.hidden_bytes
    whole += 2 * layout.model.sandwich_norm * layout.hidden_bytes
    whole += layer_activations(layout.model, layout.hidden_bytes)
    whole += 2 * (layout.model.hidden_dropout > 0) * layout.hidden_bytes / size
    mlp = 0 if "mlp" in again else (3 if layout.model.is_gated else 2) - is_frozen
    inner = mean_over_layers(layout.model, layer, layout.ffn_bytes_of)
    return whole + attention_activation_bytes(layout, layer) + mlp * inner


def mlp_backward_bytes(layout: ParallelLayout) -> float:
    """Returns the temporary bytes of an MLP's backward pass: the gradient of fc1's output, and the derivative of the
    activation.
    """
    return (4 if layout.model.is_gated else 2) * layout.ffn_bytes


def attention_activation_bytes(layout: ParallelLayout, layer: int | None = None) -> float:
    """Returns the bytes that a layer's attention saves between its norm and its output projection.

    If `layer` is None, returns the mean over all layers.
    """
    model, parallel = layout.model, layout.parallel
    again = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    of_rank = mean_over_layers(model, layer, lambda one: _saved_width(layout, one) * layout.element_bytes)
    if model.attention_backend == "local" and "core_attn" not in again:
        of_rank += _score_bytes(layout) / parallel.tensor_model_parallel_size
    return layout.tokens * of_rank


def _saved_width(layout: ParallelLayout, layer: int) -> float:
    """Returns the number of values per token that a layer's attention saves on this rank."""
    model, shape, ranks = layout.model, layout.model.layers[layer], layout.parallel.tensor_model_parallel_size
    groups = shape.num_query_groups / ranks
    queries = attention_width(model, layer) / ranks
    # Ranks that share a key/value group each have all of its keys and values, and gather the projections of all
    # ranks.
    keys = max(1.0, groups) * shape.kv_channels
    projection = qkv_width(model, layer) / (ranks if groups >= 1 or shape.keys_of is not None else 1)
    is_windowed = attended_keys(model, layer) < model.seq_length
    # Under context parallelism, and with a sliding window, attention is computed in several parts: the keys and
    # values of all ranks are saved, and so are the outputs of the parts, which are then joined.
    in_parts = is_windowed or layout.parallel.context_parallel_size > 1
    width = 2 * queries + 2 * keys * layout.parallel.context_parallel_size if in_parts else queries
    is_grouped = shape.num_query_groups < model.num_attention_heads
    if is_windowed and is_grouped:
        # On a GPU, each block of queries keeps its keys and values once for every query head.
        window = attended_keys(model, layer)
        block, beyond = block_size(window), 1 - window / model.seq_length
        width += 2 * queries * beyond * (block + window - 1) / block
    rotates = model.position_embedding_type == "rope"
    if shape.keys_of is not None:
        projected = queries if model.has_qk_norm else 0
        return width + projected + queries + (keys if rotates and not in_parts else 0)
    is_changed = rotates or model.has_qk_norm
    # A rotation does not keep the projection's output, so the values, which are a part of it, must be saved
    # separately.
    keeps_values = not layout.is_half if model.v_layernorm else not in_parts
    if keeps_values or model.has_qk_norm or not rotates:
        width += projection
    if is_changed:
        width += queries + (0 if in_parts else keys)
    if model.has_qk_norm and is_grouped and (groups > 1 or model.qk_projection_norm):
        width += queries  # with several groups, the queries are copied out of the projection's output
    if model.v_layernorm:
        width += (0 if in_parts else keys) + (
            2 * keys if layout.is_half else 0
        )  # the values are normalized in fp32
    return width


def shared_key_bytes(layout: ParallelLayout, stage: int) -> float:
    """Returns the bytes per micro-batch of the keys and values that layers of a stage share, summed over its
    chunks.
    """
    shapes = layout.model.layers
    sources = {shape.keys_of for shape in shapes if shape.keys_of is not None}
    tensor = layout.parallel.tensor_model_parallel_size
    width = sum(
        2 * max(1, shapes[source].num_query_groups // tensor) * shapes[source].kv_channels
        for source in sources
    )
    # A chunk keeps shared keys and values twice: as received (zeros in the first chunk), and as written by its
    # layers.
    written = sum(layer in sources for layer in layout.stage_layers(stage))
    return (layout.chunks + written) * width * layout.tokens * layout.element_bytes


def head_activation_bytes(layout: ParallelLayout) -> float:
    """Returns the bytes that final norm, logits and loss save for the backward pass of one micro-batch."""
    # Counts the logits, in the run's precision, and the softmax for the backward pass. The softmax is in fp32 with
    # megatron-core's loss, and in the run's precision with `cross_entropy` (without tensor parallelism).
    is_split = layout.parallel.tensor_model_parallel_size > 1
    softmax = 4 if is_split else layout.element_bytes
    if is_split and layout.parallel.cross_entropy_fusion_impl == "te":
        softmax = 0  # the gradient overwrites the logits
    # With --final-logit-softcapping, the hyperbolic tangent of the logits is kept.
    capped = layout.element_bytes * (layout.model.final_logit_softcapping is not None)
    norm = 2 * layout.hidden_bytes + end_activations(layout.model, layout.hidden_bytes)
    return norm + (layout.element_bytes + softmax + capped) * layout.logit_count


def _score_bytes(layout: ParallelLayout) -> float:
    model, size = layout.model, layout.element_bytes
    for_each = 4 + size * layout.is_half + (1 + size) * (model.attention_dropout > 0)
    return for_each * model.num_attention_heads * model.seq_length


def _chunks_in_flight(layout: ParallelLayout, stage: int) -> int:
    """Returns the largest number of forward passes that await their backward pass at the same time."""
    stages, chunks = layout.parallel.pipeline_model_parallel_size, layout.chunks
    if chunks == 1:
        return min(layout.num_microbatches, stages - stage)
    warmup = 2 * (stages - stage - 1) + (chunks - 1) * stages
    return min(layout.num_microbatches * chunks, warmup + 1)
