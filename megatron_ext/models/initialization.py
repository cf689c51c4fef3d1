"""Initializes every parameter with a generator seeded by its global name, independently of the parallel layout.

The sharded state dict gives each local parameter's global name, shape and offset at any tensor- and pipeline-parallel
size; the full tensor is sampled and the local part is kept. A model family chooses the distribution of its parameters
with the attribute `init_std` (standard deviation; 0 keeps the built value) or `init_uniform` (bound). The base model's
parameters follow Megatron-LM's scheme, with L layers:

    weights                 N(0, std)
    output projections      N(0, std / sqrt(2 L))
    norms and biases        as built
"""

import hashlib
import math
from collections.abc import Collection, Iterator
from itertools import pairwise
from math import prod

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.platform.memory.mapped_tensors import release_pages

CHECKPOINT_METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
"""The `metadata` of all `sharded_state_dict` calls: layers may differ, and optimizer states load in any layout."""

_ELEMENTS_AT_ONCE = 1 << 22
"""Approximate number of values that are sampled at a time on a CPU."""

_SCALED = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def initialize_parameters(
    model: GPTModel,
    seed: int,
    std: float,
    num_layers: int,
    only: Collection[torch.nn.Parameter] | None = None,
) -> None:
    """Initializes the parameters of a model chunk in place.

    Args:
        model: one pipeline chunk.
        seed: the values depend only on this seed and the parameters' global names.
        std: standard deviation of the base model's weights.
        num_layers: the number of layers of the whole model, L in the scheme above.
        only: the parameters to initialize; None for all.
    """
    chosen = None if only is None else {id(parameter) for parameter in only}
    for parameter, shard in parameter_shards(model.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))):
        if chosen is not None and id(parameter) not in chosen:
            continue
        _check_split(parameter, shard)
        bound = getattr(parameter, "init_uniform", None)
        if bound is not None:
            _fill(shard, seed, bound=bound)
            continue
        parameter_std = getattr(parameter, "init_std", None)
        if parameter_std is None:
            parameter_std = _base_std(shard.key, parameter, std, num_layers)
        if parameter_std > 0:
            _fill(shard, seed, std=parameter_std)


def _check_split(parameter: torch.Tensor, shard: ShardedTensor) -> None:
    # A parent that is not a `MegatronModule` loses its children's sharding, so that all ranks would get and save
    # equal values.
    split = getattr(parameter, "tensor_model_parallel", False)
    if split and parallel_state.get_tensor_model_parallel_world_size() > 1:
        assert shard.local_shape != shard.global_shape, (
            f"{shard.key} is split over tensor-parallel ranks, but its sharded state dict describes it as unsplit; "
            "derive the module that contains it from MegatronModule"
        )


def _base_std(key: str, parameter: torch.Tensor, std: float, num_layers: int) -> float:
    if parameter.dim() == 1:
        return 0.0
    return std / math.sqrt(2.0 * num_layers) if key.endswith(_SCALED) else std


def parameter_shards(state: dict[str, object]) -> Iterator[tuple[torch.Tensor, ShardedTensor]]:
    """Yields pairs of a parameter and one of its shards, for all parameters in a module's sharded state dict.

    A fused projection has several shards, whose data are views into the parameter.
    """
    for value in state.values():
        if isinstance(value, ShardedTensor) and isinstance(value.data, torch.nn.Parameter):
            yield value.data, value
        elif isinstance(value, ShardedTensorFactory):
            parameter = value.data
            pieces = value.build()
            for piece in pieces.values() if isinstance(pieces, dict) else pieces:
                yield parameter, piece


def buffer_shards(state: dict[str, object]) -> Iterator[tuple[torch.Tensor, ShardedTensor]]:
    """Yields pairs of a buffer and its shard, for all buffers in a module's sharded state dict."""
    for value in state.values():
        if isinstance(value, ShardedTensor) and not isinstance(value.data, torch.nn.Parameter):
            yield value.data, value


def _fill(shard: ShardedTensor, seed: int, *, std: float = 0.0, bound: float | None = None) -> None:
    """Samples the full tensor from N(0, std), or from U(-bound, bound), and keeps the local part."""
    digest = hashlib.sha256(f"{seed}:{shard.key}".encode()).digest()
    # The run's device is used wherever the parameter is, because generators differ between devices.
    device = process_groups.device()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    first, *others = zip(shard.global_offset, shard.local_shape, strict=True)
    columns = tuple(slice(offset, offset + size) for offset, size in others)
    local = shard.data.view(shard.local_shape)
    # Every rank samples the full tensor in fp32, so values depend neither on the split nor on its dtype.
    for start, end in _blocks_of_rows(shard.global_shape, device):
        block = torch.empty((end - start, *shard.global_shape[1:]), dtype=torch.float32, device=device)
        if bound is None:
            block.normal_(0.0, std, generator=generator)
        else:
            block.uniform_(-bound, bound, generator=generator)
        low, high = max(start, first[0]), min(end, first[0] + first[1])
        if low < high:
            part = (slice(low - start, high - start), *columns)
            local[low - first[0] : high - first[0]] = block[part]
            release_pages()


def _blocks_of_rows(shape: tuple[int, ...], device: torch.device) -> list[tuple[int, int]]:
    """Returns blocks of rows; sampling one block after the other gives the same values as a single call."""
    # On the CPU, one call draws one number after another, and converts each group of 16 numbers to 16 normally
    # distributed values. If the last group is incomplete, the last 16 values are drawn again. So every block starts
    # at a multiple of 16, and the last block has at least 16 values. On a GPU the values depend on the size of the
    # call.
    rows, width = shape[0], prod(shape[1:])
    at_once = rows if device.type != "cpu" else max(16, _ELEMENTS_AT_ONCE // max(width, 1) // 16 * 16)
    starts = [start for start in range(0, rows, at_once) if start == 0 or (rows - start) * width >= 16]
    return list(pairwise([*starts, rows]))
