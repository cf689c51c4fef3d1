"""Runs micro-batches through the model on megatron-core's schedules: without a pipeline, 1F1B, or interleaved.

Callers use the same function for every parallel layout.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_ext.data.datasets.sample_documents import DOCUMENT_STARTS
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.ops.context_parallel import part_of_batch
from megatron_ext.models.ops.documents.document_bounds import DOCUMENT_BOUNDS, document_bounds
from megatron_ext.platform import process_groups
from megatron_ext.training.engine.data_parallel import unwrap_model
from megatron_ext.training.interface.family_interface import Batch, Family, auxiliary_inputs
from megatron_ext.training.interface.output_losses import OutputLoss

Divisor = Callable[[Batch], torch.Tensor]
"""A function that returns the divisor of a micro-batch's loss sum, for use before the backward pass."""

Prepare = Callable[[list[Batch]], Iterable[Batch]]
"""A function that adds fields to micro-batches on the device; see `Family.prepare_batches`."""


def run_microbatches(
    chunks: list[Any],
    families: list[Family],
    batches: list[Batch],
    output_loss: OutputLoss,
    *,
    forward_only: bool,
    prepare: Prepare = list,
    per_token: bool = True,
) -> list[dict[str, torch.Tensor]]:
    """Runs the forward pass, and unless `forward_only` the backward pass, on every micro-batch. Collective.

    With a backward pass, the gradients are those of the mean loss over the tokens of the whole global batch, unless
    `per_token` is False.

    Args:
        chunks: this rank's model chunks, wrapped or unwrapped.
        families: the run's model families, which supply the model's auxiliary inputs.
        batches: micro-batches of equal shape, `tokens` [b, s]; each context-parallel rank takes its part of them.
        output_loss: computes the loss on the last stage.
        forward_only: whether to omit the backward pass.
        prepare: adds fields to the micro-batches once they are on the device.
        per_token: whether the loss is the mean over the global batch's tokens; otherwise it is the mean over
            micro-batches and data-parallel ranks of each micro-batch's mean.

    Returns:
        On the last stage, the sums that `output_loss` logs, one mapping per micro-batch; on other stages an empty list.
    """
    moved = _on_device(chunks, batches)
    divisor = None if forward_only else _divisor_of_all(moved) if per_token else _divisor_of_each
    prepared = prepare(moved)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        # Under pipeline parallelism, the stages run different micro-batches at the same time. If `prepare` ran
        # lazily, its collectives would block the communication between stages.
        prepared = list(prepared)
    forward_step = partial(_forward_step, families, output_loss, divisor)
    return _run_schedule(chunks, forward_step, moved, prepared, forward_only)


def run_forward(
    chunks: list[GPTModel], families: list[Family], batches: list[Batch], output_loss: OutputLoss
) -> list[dict[str, torch.Tensor]]:
    """Runs only the forward pass, on micro-batches that `run_microbatches` has passed to `prepare`. Collective.

    The micro-batches are on the device, and contain only this rank's part of the sequences under context parallelism.
    """
    forward_step = partial(_forward_step, families, output_loss, None)
    return _run_schedule(chunks, forward_step, batches, batches, forward_only=True)


def _run_schedule(
    chunks: list[Any],
    forward_step: Callable[..., tuple[torch.Tensor, Any]],
    moved: list[Batch],
    prepared: Iterable[Batch],
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Runs megatron-core's schedule on the micro-batches `moved`, with the fields of `prepared`."""
    micro_batch_size, rows = moved[0]["tokens"].shape
    # Auxiliary streams are sent as further rows of the hidden states, so stages exchange longer sequences. The schedule
    # divides their length by the context-parallel size.
    rows *= parallel_state.get_context_parallel_world_size() * _pipeline_factor(unwrap_model(chunks[0]))
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        # Every virtual stage processes the same micro-batches.
        data_iterator=[iter(prepared) for _ in chunks] if len(chunks) > 1 else iter(prepared),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(moved),
        seq_length=rows,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def accumulate_gradients(
    chunks: list[Any], batches: list[Batch], backward: Callable[[Batch], None], prepare: Prepare
) -> None:
    """Accumulates the gradients of a step whose micro-batches need no pass through the whole model. Collective.

    Args:
        chunks: this rank's model chunks, wrapped by `wrap_model`.
        batches: micro-batches of equal shape, `tokens` [b, s]; each context-parallel rank takes its part of them.
        backward: adds the gradients of one prepared micro-batch; see `Family.backward`.
        prepare: adds fields to the micro-batches once they are on the device.
    """
    moved = _on_device(chunks, batches)
    left = len(moved)
    for batch in prepare(moved):
        left -= 1
        with contextlib.ExitStack() as stack:
            if left:
                # As in the schedules, gradients are reduced over data-parallel ranks only after the last micro-batch.
                for chunk in chunks:
                    stack.enter_context(chunk.no_sync())
            backward(batch)
        del batch  # free its fields before `prepare` computes the next batch's fields
    get_model_config(chunks[0]).finalize_model_grads_func(chunks, None)


def _on_device(chunks: list[Any], batches: list[Batch]) -> list[Batch]:
    """Returns this rank's part of the micro-batches, on the device; checks that the model supports their length."""
    unwrap_model(chunks[0]).check_length(batches[0]["tokens"].size(1))
    device, group = process_groups.device(), parallel_state.get_context_parallel_group()
    moved = ({name: _moved(value, device) for name, value in batch.items()} for batch in batches)
    return [
        part_of_batch(on_device, group) | _bounds_of(batch, device)
        for batch, on_device in zip(batches, moved, strict=True)
    ]


def _bounds_of(batch: Batch, device: torch.device) -> Batch:
    """Returns the field with the documents' bounds, in host memory; {} if the batch marks no document starts.

    The batch contains whole sequences, before they are split over context-parallel ranks.
    """
    if DOCUMENT_STARTS not in batch:
        return {}
    bounds = document_bounds(batch[DOCUMENT_STARTS])
    # Pin the bounds, because attention on a GPU copies them in every layer.
    return {DOCUMENT_BOUNDS: bounds.pin_memory() if device.type == "cuda" else bounds}


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and value.device.type == "cpu":
        # A copy from unpinned memory would make the host wait. The loader pins its tensors, but families add further
        # tensors.
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def _divisor_of_all(batches: list[Batch]) -> Divisor:
    """Returns a function that gives every micro-batch the same divisor: the mean sum of loss weights per micro-batch.

    The mean is over the micro-batches of all data-parallel ranks. The divisor is 1 if all weights are 0.
    """
    # megatron-core averages gradients over micro-batches and data-parallel ranks. If every micro-batch's loss sum is
    # divided by this value, the average is the mean loss over the global batch.
    total = torch.stack([batch["loss_mask"].double().sum() for batch in batches]).sum()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(total, group=group)
    mean = (total / (len(batches) * parallel_state.get_data_parallel_world_size())).float()
    divisor = torch.where(mean > 0, mean, 1.0)
    return lambda batch: divisor


def _divisor_of_each(batch: Batch) -> torch.Tensor:
    """Returns a micro-batch's own sum of loss weights, as in Megatron-LM's default; 1 if all weights are 0.

    As in Megatron-LM, each rank's part of the sequences counts as a micro-batch under context parallelism.
    """
    total = batch["loss_mask"].sum(dtype=torch.float32)
    return torch.where(total > 0, total, 1.0) * parallel_state.get_context_parallel_world_size()


def _forward_step(
    families: list[Family],
    output_loss: OutputLoss,
    divisor: Divisor | None,
    batches: Iterator[Batch],
    model: Any,
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    chunk = unwrap_model(model)
    with chunk.without_head() if output_loss.reads == "hidden" else contextlib.nullcontext():
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch.get("attention_mask"),
            auxiliary_inputs=auxiliary_inputs(families, batch),
            document_bounds=batch.get(DOCUMENT_BOUNDS),
            labels=batch["labels"] if output_loss.reads == "losses" else None,
        )
    return output, partial(_loss, output_loss, chunk, batch, divisor)


def _loss(
    output_loss: OutputLoss, chunk: GPTModel, batch: Batch, divisor: Divisor | None, output: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    total, sums = output_loss(chunk, batch, output)
    return total if divisor is None else total / divisor(batch), sums


def run_directly(chunk: GPTModel, families: list[Family], batch: Batch) -> torch.Tensor:
    """Runs one micro-batch without megatron-core's schedule; may be called while the schedule runs.

    Args:
        chunk: the whole model (pipeline-parallel size 1), unwrapped.
        families: the run's model families, which supply the model's auxiliary inputs.
        batch: a micro-batch on the device.

    Returns:
        The output layer's input, [s, b, h] ([s/t, b, h] under sequence parallel).
    """
    with chunk.without_head():
        return chunk(
            batch["tokens"],
            batch["position_ids"],
            batch.get("attention_mask"),
            auxiliary_inputs=auxiliary_inputs(families, batch),
            document_bounds=batch.get(DOCUMENT_BOUNDS),
        )


def _pipeline_factor(chunk: GPTModel) -> int:
    return chunk.auxiliary.pipeline_factor(chunk.config.hidden_size)
