"""Counts the parameters, forward FLOPs per token and activations that per-layer embedding (PLE) adds to a model.

    parameters   Vp L p + h L p + p + L (2 h p + h)          + 2 p p L for concat and gated
    FLOPs        L 6 h p                                     + L 4 p p for concat and gated

Letters: Vp rows of a table, L layers, h hidden size, p per-layer hidden size. The terms of the parameters are, in this
order: tables, context projections, the shared norm, then gate, output projection and post-norm of every layer; the
preset gemma3n adds a vector [h] per layer. Only matrix products count as FLOPs; a table look-up costs none.

A rank keeps these values per token for the backward pass (q = p / t; h is divided under sequence parallelism):

    a layer's block      2 h + 3 q     its input and W_out's output; W_gate's output, the activation (relu: only one
                                       of these two) and the product with the vector
    a layer's vector     2 q           projection and vector; concat: 2 p more, gated: 2 p + 3 q more
    a stage              h             the received word embedding; undivided if the stage gathers the sequence

It also keeps copies of all layers' context projections and combination matrices, which are multiplied in one product.
"""

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.models.costs.activation_memory import FamilyActivations, ParallelLayout
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
    of_a_layer += hidden * settings.adds_to_inactive_streams
    return ModelCost(
        parameters=layers * of_a_layer + width,
        forward_flops_per_token=float(layers * (6 * hidden * width + 2 * combination)),
        trained_apart=layers * rows * width if settings.trains_rows else 0,
    )


def per_layer_activations(settings: PerLayerConfig, layout: ParallelLayout, rows: int) -> FamilyActivations:
    """Returns the bytes that PLE adds to the activations, and with `--per-layer-sparse` the bytes of the tables' state.

    Args:
        settings: PLE's configuration.
        layout: the run's settings.
        rows: Vp, the number of rows of a table.
    """
    width, method = settings.per_layer_hidden_size, settings.per_layer_combination_method
    tensor, size = layout.parallel.tensor_model_parallel_size, layout.element_bytes
    value = layout.tokens * size  # bytes of one value per token
    part = value * width / tensor
    gate = 2 if settings.per_layer_gate_activation == "relu" else 3
    block = 2 * layout.hidden_bytes + gate * part
    if settings.adds_to_inactive_streams:
        block += (
            layout.residual_bytes
        )  # the block copies all residual streams, although it multiplies only one
    if settings.per_layer_projection_dropout > 0:
        block += part + part / size  # the result of dropout, and a mask of one byte per value
    context = width * layout.model.hidden_size / tensor * size
    kept = 2 * part
    if method != "scaled_add":
        kept += 2 * value * width + 2 * width * width / tensor * size
    if method == "gated":
        kept += 3 * part
    rows_per_token = settings.rows_per_token
    layers, stages = layout.model.num_layers, range(layout.parallel.pipeline_model_parallel_size)
    chunks = [chunk for stage in stages for chunk in layout.stage_chunks(stage)]
    writes = {shape.keys_of for shape in layout.model.layers if shape.keys_of is not None}
    streams = [kept] * layers
    for chunk in chunks:
        for layer in chunk if len(chunk) > 1 else ():
            streams[layer] += context
        if chunk.start:
            streams[chunk.start] += layout.hidden_bytes
        if layout.sequence_split > 1:
            streams[chunk.start] += layout.hidden_bytes * layout.sequence_split
        # When the base model writes a stream, all packed streams of the chunk are copied.
        streams[chunk.start] += len(writes & set(chunk)) * len(chunk) * part
    state, step_rows = _rows_bytes(settings, layout, rows)
    table = rows * width / tensor * size
    return FamilyActivations(
        weights=(-table,) * layers if settings.per_layer_offload is not None else (),
        state=(state,) * layers if settings.trains_rows else (),
        at_most=(step_rows,) * layers if settings.trains_rows else (),
        layers=(block,) * layers,
        streams=tuple(streams),
        held=(0.0,) * layers,
        # The gradient of a chunk's vectors, and a layer's rows before they are summed.
        transient=max(map(len, chunks)) * part + rows_per_token * part * (rows_per_token > 1),
    )


def _rows_bytes(settings: PerLayerConfig, layout: ParallelLayout, rows: int) -> tuple[float, float]:
    """Returns the bytes that `RowOptimizer` keeps on the device for a layer's table, and the most that it adds to
    them during a step.
    """
    columns = settings.per_layer_hidden_size / layout.parallel.tensor_model_parallel_size
    of_row = _state_bytes(settings, columns)
    ranks = layout.data_parallel_size * layout.parallel.context_parallel_size
    is_on_device = settings.per_layer_offload is None
    shards = ranks if layout.parallel.use_distributed_optimizer and is_on_device else 1
    touched = min(rows, layout.tokens * layout.num_microbatches * ranks * settings.rows_per_token)
    # Counts the gradient, the looked-up weights (unless these are the copied ones), and weights and state of this
    # rank's share of the rows.
    has_inputs = layout.is_half or shards > 1
    in_step = (4 + layout.element_bytes * has_inputs) * columns + (4 * columns + of_row) / shards
    kept = _kept_bytes(settings, columns, layout.is_half)
    return is_on_device * rows * kept / shards, touched * in_step


def off_device_bytes(
    settings: PerLayerConfig, rows: int, layers: int, columns: int, element_bytes: int
) -> float:
    """Returns the bytes of a rank's tables [layers, rows, columns] and their optimizer state."""
    of_row = float(element_bytes * columns)
    if settings.trains_rows:
        of_row += _kept_bytes(settings, columns, element_bytes < 4)
    return layers * rows * of_row


def _kept_bytes(settings: PerLayerConfig, columns: float, is_half: bool) -> float:
    """Returns the bytes of optimizer state and, in half precision, main weights for a row of a table."""
    return _state_bytes(settings, columns) + (4 * columns if is_half else 0)


def _state_bytes(settings: PerLayerConfig, columns: float) -> float:
    """Returns the bytes of optimizer state for a row of a table."""
    return {"adam": 8 * columns, "lazy_adam": 8 * columns, "rowwise_adagrad": 4.0, "sgd": 0.0}[
        settings.per_layer_optimizer
    ]
