"""Runs micro-batches through the model on megatron-core's pipeline schedules (none, 1F1B, interleaved).

Callers see one function for every cut; what differs (one iterator a virtual stage, longer tensors between stages when
side streams travel) is settled here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_ext.training.family import Batch, Family

LossFunction = Callable[[Batch, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(micro-batch, losses [b, s]) -> (scalar to differentiate, what the last stage returns)."""


def run_microbatches(
    chunks: list[Any],
    families: list[Family],
    batches: list[Batch],
    loss_function: LossFunction,
    *,
    forward_only: bool,
) -> list[dict[str, torch.Tensor]]:
    """Forward (and backward) on every micro-batch.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        families: asked for the model's side inputs.
        batches: micro-batches of equal shape, `tokens` [b, s].
        loss_function: called on the last stage.
        forward_only: no backward pass.

    Returns:
        The loss function's second value for each micro-batch on the last stage, an empty list on the others.
    """
    device = torch.device(torch.cuda.current_device())
    moved = [
        {name: value.to(device, non_blocking=True) for name, value in batch.items()} for batch in batches
    ]
    micro_batch_size, sequence_length = moved[0]["tokens"].shape
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, families, loss_function),
        # Every virtual stage works on the same micro-batches.
        data_iterator=[iter(moved) for _ in chunks] if len(chunks) > 1 else iter(moved),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(moved),
        # Side streams travel as further rows, so between stages the sequence is longer.
        seq_length=sequence_length * _pipeline_factor(chunks[0]),
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def _forward_step(
    families: list[Family], loss_function: LossFunction, batches: Iterator[Batch], model: Any
) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    side_inputs: dict[str, torch.Tensor] = {}
    for family in families:
        side_inputs |= family.side_inputs(batch)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        side_inputs=side_inputs,
        labels=batch["labels"],
    )
    return output, partial(loss_function, batch)


def _pipeline_factor(chunk: Any) -> int:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk.channel.pipeline_factor(chunk.config.hidden_size)
