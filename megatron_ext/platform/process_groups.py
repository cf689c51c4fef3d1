"""Sets up and ends distributed computation: device, process group, megatron-core's parallel state and random streams.

`initialize` works on a laptop (CPU, gloo) and on a cluster (CUDA, NCCL). It reads the environment variables that
`torchrun` sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without them, the run is a single process.
"""

import os
import signal
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_ext.config.cross_checks import launched_processes
from megatron_ext.config.groups.parallel_config import ParallelConfig
from megatron_ext.platform import cpu
from megatron_ext.platform import shared_groups as groups
from megatron_ext.platform.parent_process import signal_at_parents_end


def use_cuda() -> bool:
    """Returns whether a CUDA device is present."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Returns the device of this process: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda() else torch.device("cpu")


def world_size() -> int:
    """Returns the number of processes of the run, from `torchrun`'s environment; 1 without `torchrun`."""
    return launched_processes() or 1


def rank() -> int:
    """Returns the rank of this process, from `torchrun`'s environment; 0 without `torchrun`."""
    return int(os.environ.get("RANK", "0"))


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Joins the process group and sets up the parallel state and the random streams. Collective.

    Args:
        parallel: the parallel layout.
        seed: seed that the random streams of all ranks are derived from.

    Raises:
        ValueError: the machine does not support the chosen communication backend.
    """
    backend = _backend(parallel.distributed_backend)
    # mcore requires one hardware queue, so that communication starts before the computation that it overlaps.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if use_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cpu.install()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A launcher that is killed by SIGKILL cannot stop its workers. With this signal, the workers save and exit.
        signal_at_parents_end(signal.SIGTERM)
    if not dist.is_initialized():
        _join(backend, timedelta(minutes=parallel.distributed_timeout_minutes))
    set_parallel_state(parallel, seed)


def needs_gloo_twins(parallel: ParallelConfig) -> bool:
    """Returns whether megatron-core must create additional gloo groups, to gather checkpoints in CPU memory."""
    return _backend(parallel.distributed_backend) == "nccl"  # the other backends handle tensors of the CPU


def set_parallel_state(parallel: ParallelConfig, seed: int) -> None:
    """Sets megatron-core's parallel state and random streams; the process group must exist. Collective."""
    parallel_state.destroy_model_parallel()  # mcore refuses to set a state that is set already
    with groups.shared_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
            create_gloo_process_groups=needs_gloo_twins(parallel),
        )
    seed_streams(seed)


def seed_streams(seed: int) -> int:
    """Seeds torch's generator and mcore's named random streams for this rank; the parallel state must be set.

    From the seed, mcore derives one stream that all tensor-parallel ranks share and one that differs on each of them.

    Returns:
        The seed of this rank's pipeline stage and model copy; use it to seed the generators of other libraries.
    """
    # Stages hold different layers, and model copies read different sequences, so each of them needs its own dropout
    # masks.
    stage = parallel_state.get_pipeline_model_parallel_rank()
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    own = seed + 100 * stage + 100_000 * copy
    torch.manual_seed(own)
    model_parallel_cuda_manual_seed(own, force_reset_rng=True)
    return own


def shutdown() -> None:
    """Leaves the process group; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        groups.forget()
        dist.destroy_process_group()


def _backend(requested: str) -> str:
    if requested == "nccl" and not use_cuda():
        raise ValueError(
            "--distributed-backend nccl: requires a CUDA device, but this machine has none; use gloo or auto"
        )
    if requested == "auto":
        return "cpu:gloo,cuda:nccl" if use_cuda() else "gloo"
    return requested


def _join(backend: str, timeout: timedelta) -> None:
    # If the GPU is given, NCCL connects all processes now, so that a broken network is reported at the start.
    gpu = device() if "nccl" in backend else None
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=gpu)
    else:
        # A single process needs no rendezvous: an in-memory store opens no port.
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=gpu
        )
    if gpu is not None:
        _split_no_groups()


def _split_no_groups() -> None:
    """Makes NCCL connect every further group when it is first used, as it does if no `device_id` is given."""
    # Otherwise, torch splits each new group from the default group. All processes would then wait for every group of
    # the run, one after the other, and would hang at a gloo group, whose members do not take part in the split.
    group: Any = dist.group.WORLD
    group.bound_device_id = None
