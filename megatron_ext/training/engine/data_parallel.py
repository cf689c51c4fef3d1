"""Puts the model into megatron-core's data-parallel wrapper, takes it out, and completes its parameters.

bf16 runs keep fp32 main weights in the optimizer and reduce gradients in fp32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.training.engine.gradient_norms import mark_reduced_ranges


def wrap_model(
    chunks: list[GPTModel], parallel: ParallelConfig, *, bf16: bool
) -> list[DistributedDataParallel]:
    """Puts the chunks into bf16 (where asked) and megatron-core's data-parallel wrapper.

    Args:
        chunks: this rank's model chunks; families have frozen what they freeze.
        parallel: tells how gradients are reduced.
        bf16: the precision of parameters and activations.
    """
    config = get_model_config(chunks[0])
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=bf16,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the step looks at loss and gradient norm itself, and skips
    )
    modules = [Float16Module(config, chunk) if bf16 else chunk for chunk in chunks]
    wrapped = [
        # Bucketing overlaps reduction with backward; later chunks' backward comes first, with nothing to overlap.
        DistributedDataParallel(config, ddp_config, module, disable_bucketing=index > 0)
        for index, module in enumerate(modules)
    ]
    mark_reduced_ranges(wrapped)
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if parallel.overlap_grad_reduce and len(wrapped) > 1:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def unwrap_model(chunk: Any) -> GPTModel:
    """The model inside the wrappers of `wrap_model`, or the model itself where there are none."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    model: GPTModel = chunk
    return model


def unwrap_models(chunks: Sequence[torch.nn.Module]) -> list[GPTModel]:
    """The models inside this rank's chunks, wrapped or not."""
    return [unwrap_model(chunk) for chunk in chunks]


def gather_parameters(chunks: list[torch.nn.Module]) -> None:
    """Completes what the last step has left to the next forward pass under `--overlap-param-gather`; collective.

    Until then every rank has the new values of its own part of the parameters alone.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
