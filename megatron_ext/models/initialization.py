"""Draws every parameter from a generator seeded by its global name, so that weights do not depend on the parallel
layout.

The sharded state dict knows each local parameter's global name, shape and offset, whatever the tensor and pipeline
parallel sizes; the full tensor is drawn and the local part kept. A parameter says how it is drawn with the attribute
`init_std` (0 leaves it as it was built: norms, biases), or with `init_uniform`, a bound; families set one on theirs.

    base model:  N(0, std), output projections N(0, std / sqrt(2 L))            (Megatron-LM's scheme)
"""

import hashlib
import math
from collections.abc import Collection, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.models.gpt_model import GPTModel

CHECKPOINT_METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
"""Passed to every `sharded_state_dict`: layers may differ, and optimizer states load at any parallel layout."""

_SCALED = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def initialize_parameters(
    model: GPTModel,
    seed: int,
    std: float,
    num_layers: int,
    only: Collection[torch.nn.Parameter] | None = None,
) -> None:
    """Draws all parameters of a model chunk in place.

    Args:
        model: one pipeline chunk (a megatron-core module).
        seed: the run's seed.
        std: standard deviation of the base model's weights.
        num_layers: L of the scaled initialisation.
        only: the parameters to draw; without it all are.
    """
    chosen = None if only is None else {id(parameter) for parameter in only}
    for parameter, shard in parameter_shards(model.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))):
        if chosen is not None and id(parameter) not in chosen:
            continue
        _check_split(parameter, shard)
        bound = getattr(parameter, "init_uniform", None)
        if bound is not None:
            shard.data.copy_(_draw(shard, seed, bound=bound))
            continue
        parameter_std = getattr(parameter, "init_std", None)
        if parameter_std is None:
            parameter_std = _base_std(shard.key, parameter, std, num_layers)
        if parameter_std > 0:
            shard.data.copy_(_draw(shard, seed, std=parameter_std))


def _check_split(parameter: torch.Tensor, shard: ShardedTensor) -> None:
    """A module that is no `MegatronModule` hides how its children are split; ranks would draw and save the same."""
    split = getattr(parameter, "tensor_model_parallel", False)
    if split and parallel_state.get_tensor_model_parallel_world_size() > 1:
        assert shard.local_shape != shard.global_shape, (
            f"{shard.key} is split over tensor-parallel ranks, but its sharded state dict says that it is whole"
        )


def _base_std(key: str, parameter: torch.Tensor, std: float, num_layers: int) -> float:
    if parameter.dim() == 1:
        return 0.0
    return std / math.sqrt(2.0 * num_layers) if key.endswith(_SCALED) else std


def parameter_shards(state: dict[str, object]) -> Iterator[tuple[torch.Tensor, ShardedTensor]]:
    """Each parameter with each of its shards (a fused projection has several, as views into the parameter).

    Args:
        state: a module's sharded state dict.
    """
    for value in state.values():
        if isinstance(value, ShardedTensor) and isinstance(value.data, torch.nn.Parameter):
            yield value.data, value
        elif isinstance(value, ShardedTensorFactory):
            parameter = value.data
            pieces = value.build()
            for piece in pieces.values() if isinstance(pieces, dict) else pieces:
                yield parameter, piece


def _draw(shard: ShardedTensor, seed: int, *, std: float = 0.0, bound: float | None = None) -> torch.Tensor:
    """The local part of a tensor drawn from N(0, std), or from U(-bound, bound)."""
    digest = hashlib.sha256(f"{seed}:{shard.key}".encode()).digest()
    device = shard.data.device
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    full = torch.empty(shard.global_shape, dtype=torch.float32, device=device)
    if bound is None:
        full.normal_(0.0, std, generator=generator)
    else:
        full.uniform_(-bound, bound, generator=generator)
    local = full[
        tuple(
            slice(start, start + size)
            for start, size in zip(shard.global_offset, shard.local_shape, strict=True)
        )
    ]
    return local.view(shard.data.shape)
