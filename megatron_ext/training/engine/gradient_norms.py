"""Computes the gradients' global norm, clips by it, and computes the norms of individual gradients for statistics.

Without the distributed optimizer, every data-parallel rank has the whole reduced gradient in `main_grad`. With the
distributed optimizer, a rank has only its own part of every bucket; the rest of `main_grad` is not reduced and must
not be read.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_ext.models.attached_losses import LayerLosses
from megatron_ext.platform import process_groups


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Returns the global L2 norm of the gradients on the device, a scalar in float64. Collective.

    The result equals `optimizer.get_grad_norm()`. The engine's method is not used, because without Transformer Engine
    and Apex it waits for the device once per tensor.
    """
    gradients = _counted_gradients(optimizer)
    square = torch.zeros((), device=process_groups.device())
    if gradients:
        square = torch.stack(torch._foreach_norm(gradients)).norm().square()
    dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square.double().sqrt()


@torch.no_grad()
def zeros_in_gradient(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Returns the number of zeros in the gradients, a scalar in float64 on the device. Collective.

    The result equals `optimizer.count_zeros()`, which makes the host wait.
    """
    zeros = torch.zeros((), dtype=torch.float64, device=process_groups.device())
    for gradient in _counted_gradients(optimizer):
        zeros += gradient.numel() - torch.count_nonzero(gradient)
    dist.all_reduce(zeros, group=optimizer.get_grad_stats_parallel_group())
    return zeros


def _counted_gradients(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """Returns this rank's gradients, without those of shared and of duplicated parameters."""
    # Only the parts of a chained optimizer can select these gradients. 0.19 renamed their method.
    name = "get_grads_for_grad_norm"
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        gradient
        for part in parts
        for gradient in getattr(part, name if hasattr(part, name) else "get_main_grads_for_grad_norm")()
    ]


def clip_gradients(optimizer: MegatronOptimizer, norm: torch.Tensor, largest: float) -> None:
    """Scales this rank's gradients in place so that their global norm does not exceed `largest`.

    Args:
        optimizer: the optimizer that holds the gradients.
        norm: the gradients' global L2 norm, from `gradient_norm`.
        largest: the largest norm that is allowed.
    """
    # megatron-core's clipping is not used: without Apex and Transformer Engine it allocates a scaled copy of all
    # gradients.
    factor = (largest / (norm + 1.0e-6)).clamp(max=1.0)
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    gradients = [p.grad for part in parts for p in part.get_parameters() if p.grad is not None]
    # A factor of 1 changes nothing. On a CPU, skip the multiplication then; on a GPU, the host would have to wait for
    # the factor.
    if gradients and (factor.is_cuda or factor < 1.0):
        torch._foreach_mul_(gradients, factor.float())


def mark_reduced_ranges(wrapped: list[DistributedDataParallel]) -> None:
    """Stores in each parameter's attribute `reduced_range` the part of the flattened gradient that this rank reduces.

    Does nothing without the distributed optimizer.
    """
    for chunk in wrapped:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for buffer in chunk.buffers:
            ranks = buffer.data_parallel_group.size()
            for parameter, (start, end, bucket_number) in buffer.param_index_map.items():
                bucket = buffer.buckets[bucket_number]
                size = bucket.grad_data.numel() // ranks
                first = bucket.offset + size * buffer.data_parallel_group.rank()
                low, high = max(first, start), min(first + size, end)
                parameter.reduced_range = (low - start, high - start) if low < high else (0, 0)


def gradient_square_sum(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns this rank's part of a gradient's squared norm; the sum over all data-parallel ranks is the squared norm.

    Args:
        parameter: a parameter of a model wrapped by `wrap_model`. The result is 0 for a frozen parameter. With
            --fp16, the gradient is still scaled at this point, but the result is unscaled.

    Returns:
        A scalar, float64.
    """
    gradient = getattr(parameter, "main_grad", None)
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=parameter.device)
    reduced = getattr(parameter, "reduced_range", None)
    if reduced is None:
        divisor = float(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
    else:
        gradient, divisor = gradient.flatten()[slice(*reduced)], 1.0
    unscaled = (
        gradient.float() / LayerLosses.loss_scale if LayerLosses.loss_scale != 1.0 else gradient.float()
    )
    return unscaled.square().sum(dtype=torch.float64) / divisor
