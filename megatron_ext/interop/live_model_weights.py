"""Copies a base model's tensors into and out of a model in memory, without a checkpoint on disk."""

from collections.abc import Iterator, Mapping

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_ext.models.base_parameters import ADAPTERS, base_tensor_ids
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA, buffer_shards, parameter_shards
from megatron_ext.platform.collectives import gather_or_raise


@torch.no_grad()
def load_into(chunks: list[GPTModel], state: Mapping[str, torch.Tensor]) -> None:
    """Copies `state` into the base model's parameters, in any parallel layout. Collective.

    Parameters that model families have added, and that `state` lacks, keep their values.

    Args:
        chunks: this rank's model chunks, with the configuration and vocabulary size that `state` belongs to.
        state: unsharded tensors by global name, as in `load_hf(...).state`; they are read one at a time and converted
            to the dtype of the parameters.

    Raises:
        ValueError: the names or shapes in `state` differ from the model's; raised on every rank.
    """
    taken = set().union(*gather_or_raise(lambda: _fill(chunks, state)))
    left = sorted(set(state) - taken)
    if left:
        raise ValueError(
            f"the given tensors contain {left[0]}, which the model to be filled lacks "
            f"(number of such tensors: {len(left)})"
        )


def _fill(chunks: list[GPTModel], state: Mapping[str, torch.Tensor]) -> set[str]:
    taken: set[str] = set()
    for chunk in chunks:
        base = base_tensor_ids([chunk])
        name, whole = "", torch.empty(0)
        stored = chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        for parameter, shard in (*parameter_shards(stored), *buffer_shards(stored)):
            if shard.key not in state:
                if id(parameter) not in base:
                    continue
                raise ValueError(f"the model to be filled has {shard.key}, which the given tensors lack")
            if shard.key != name:  # a fused projection has several shards of one tensor; read it once
                name, whole = shard.key, state[shard.key]
            if whole.shape[1:] != shard.global_shape[1:] or whole.shape[0] > shard.global_shape[0]:
                raise ValueError(
                    f"{name}: the model to be filled requires shape {list(shard.global_shape)}, "
                    f"got {list(whole.shape)}"
                )
            ranges = zip(shard.global_offset, shard.local_shape, strict=True)
            # This layout may pad the vocabulary further than `state` does; the extra rows stay zero, like all
            # padding.
            part = whole[tuple(slice(start, start + size) for start, size in ranges)]
            shard.data.zero_()
            shard.data.view(shard.local_shape)[: part.size(0)].copy_(part)
            taken.add(name)
    return taken


@torch.no_grad()
def base_state(chunks: list[GPTModel]) -> dict[str, torch.Tensor]:
    """Returns the base model's tensors by global name for `export_hf`, without those that model families have added.

    Args:
        chunks: all chunks of the model, in one process (tensor- and pipeline-parallel size 1).

    Returns:
        Unsharded tensors by name. They share the model's memory and stay on its device.
    """
    base = base_tensor_ids(chunks)
    return {shard.key: _whole(tensor, shard) for tensor, shard in _stored(chunks) if id(tensor) in base}


@torch.no_grad()
def whole_state(chunks: list[GPTModel]) -> dict[str, torch.Tensor]:
    """Like `base_state`, but includes the tensors that model families have added, except those of adapters."""
    return {
        shard.key: _whole(tensor, shard)
        for tensor, shard in _stored(chunks)
        if ADAPTERS not in shard.key.split(".")
    }


def _stored(chunks: list[GPTModel]) -> Iterator[tuple[torch.Tensor, ShardedTensor]]:
    for chunk in chunks:
        stored = chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        yield from (*parameter_shards(stored), *buffer_shards(stored))


def _whole(tensor: torch.Tensor, shard: ShardedTensor) -> torch.Tensor:
    assert tensor.numel() == torch.Size(shard.global_shape).numel(), "the model is sharded"
    return tensor.detach().view(shard.global_shape)
