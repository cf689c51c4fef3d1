"""A base model's tensors into, and out of, built model chunks, without a checkpoint on disk."""

from collections.abc import Mapping

import torch

from megatron_ext.models.base_parameters import base_parameter_ids
from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.models.initialization import CHECKPOINT_METADATA, parameter_shards
from megatron_ext.platform.collectives import gather_or_raise


@torch.no_grad()
def load_into(chunks: list[GPTModel], state: Mapping[str, torch.Tensor]) -> None:
    """Fills the base model's parameters at the present parallel layout; what families have added is left alone.
    Collective.

    Args:
        chunks: this rank's model chunks, built from `state`'s `ModelConfig` and vocabulary, with or without families.
        state: a checkpoint's tensors by global name, whole, as `load_hf(...).state`; read one at a time, and copied
            into the parameters' own precision.

    Raises:
        ValueError: the model has other tensors than `state`; on every rank.
    """
    taken = set().union(*gather_or_raise(lambda: _fill(chunks, state)))
    left = sorted(set(state) - taken)
    if left:
        raise ValueError(
            f"{left[0]} ({len(left)} tensors in all) has no place in the model that is to be filled"
        )


def _fill(chunks: list[GPTModel], state: Mapping[str, torch.Tensor]) -> set[str]:
    taken: set[str] = set()
    for chunk in chunks:
        base = base_parameter_ids([chunk])
        name, whole = "", torch.empty(0)
        for parameter, shard in parameter_shards(
            chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        ):
            if id(parameter) not in base:
                continue
            if shard.key not in state:
                raise ValueError(f"the model to be filled has {shard.key}, which the given tensors lack")
            if shard.key != name:  # a fused projection asks for the same tensor several times
                name, whole = shard.key, state[shard.key]
            if whole.shape[1:] != shard.global_shape[1:] or whole.shape[0] > shard.global_shape[0]:
                raise ValueError(
                    f"{name}: has shape {list(whole.shape)}, in the model to be filled {list(shard.global_shape)}"
                )
            ranges = zip(shard.global_offset, shard.local_shape, strict=True)
            # A vocabulary that is padded further at this cut has rows past the end: zero, as all padding.
            part = whole[tuple(slice(start, start + size) for start, size in ranges)]
            shard.data.zero_()
            shard.data.view(shard.local_shape)[: part.size(0)].copy_(part)
            taken.add(name)
    return taken


@torch.no_grad()
def base_state(chunks: list[GPTModel]) -> dict[str, torch.Tensor]:
    """The base model's tensors by global name, without what families have added, for `export_hf`.

    Args:
        chunks: all chunks of the model, on one process (tensor- and pipeline-parallel sizes of 1).

    Returns:
        Name -> whole tensor on its device, sharing the model's memory.
    """
    found: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        base = base_parameter_ids([chunk])
        for parameter, shard in parameter_shards(
            chunk.sharded_state_dict(metadata=dict(CHECKPOINT_METADATA))
        ):
            if id(parameter) not in base:
                continue
            assert parameter.numel() == torch.Size(shard.global_shape).numel(), "the model is cut"
            found[shard.key] = parameter.detach().view(shard.global_shape)
    return found
