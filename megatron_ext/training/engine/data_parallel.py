"""Wraps the model for megatron-core's data parallelism, and unwraps it."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.config.groups.training_config import Precision
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform.run_phases import GRADIENTS, in_phase
from megatron_ext.training.engine.gradient_norms import mark_reduced_ranges


@in_phase(GRADIENTS)
def wrap_model(
    chunks: list[GPTModel], parallel: ParallelConfig, *, precision: Precision = "fp32"
) -> list[DistributedDataParallel]:
    """Converts the chunks to bf16 or fp16 if that is set, and wraps them for data parallelism.

    Args:
        chunks: this rank's model chunks. Freeze parameters first: frozen ones get no gradient buffer.
        parallel: the parallel layout, which specifies how gradients are reduced.
        precision: precision of parameters and activations.
    """
    config = get_model_config(chunks[0])
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.reduces_in_fp32(precision),
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # it would abort the run; `Stepper` skips a non-finite step instead
    )
    modules = [Float16Module(config, chunk) if precision != "fp32" else chunk for chunk in chunks]
    wrapped = [
        # With buckets, reduction overlaps with the rest of the backward pass. As in Megatron-LM, only the first chunk
        # has buckets: with interleaving, a later chunk's reduction overlaps with the backward pass of earlier chunks
        # anyway.
        DistributedDataParallel(
            config,
            ddp_config,
            module,
            disable_bucketing=index > 0,
            **_buffer_layout(ddp_config, module, has_buckets=index == 0),
        )
        for index, module in enumerate(modules)
    ]
    mark_reduced_ranges(wrapped)
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    if parallel.overlap_grad_reduce and len(wrapped) > 1:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def _buffer_layout(
    ddp_config: DistributedDataParallelConfig, module: torch.nn.Module, *, has_buckets: bool
) -> dict[str, Any]:
    """Returns the layout of the distributed optimizer's parameters in their buffers, as an argument of the
    wrapper.
    """
    # Up to 0.17, the wrapper computes the layout. From 0.18 on, the caller should compute it; otherwise the wrapper
    # does so and logs a message.
    compute = getattr(DistributedOptimizer, "compute_full_param_layout", None)
    if compute is None or not ddp_config.use_distributed_optimizer:
        return {}
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    # As in the wrapper: on later stages, reduction is not on the critical path, so one bucket holds all parameters.
    has_buckets = has_buckets and parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    bucket_size = (
        max(40_000_000, 1_000_000 * ranks) if has_buckets and ddp_config.overlap_grad_reduce else None
    )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return {"full_param_layout": compute(trained, bucket_size, ranks, ddp_config)}


def unwrap_model(chunk: Any) -> GPTModel:
    """Returns the model inside the wrappers of `wrap_model`, or the model itself if it has none."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    model: GPTModel = chunk
    return model


def unwrap_models(chunks: Sequence[torch.nn.Module]) -> list[GPTModel]:
    """Returns the models inside this rank's chunks, wrapped or not."""
    return [unwrap_model(chunk) for chunk in chunks]


def gather_parameters(chunks: list[torch.nn.Module]) -> None:
    """Gathers the parameters that the last step updated. Collective; does nothing without --overlap-param-gather.

    With this flag, the next forward pass would gather the parameters; until then, each rank has new values only for
    its own part of them.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
