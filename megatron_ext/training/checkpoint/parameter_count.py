"""Counts a model's trainable and frozen parameters over all ranks, each replicated parameter once."""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from megatron_ext.models.gpt_model import GPTModel
from megatron_ext.platform import process_groups
from megatron_ext.training.checkpoint.checkpoint_tensors import model_state


def count_parameters(chunks: list[GPTModel]) -> dict[str, int]:
    """Returns the whole model's number of parameters under the keys `trainable` and `frozen`; collective."""
    counts = {"trainable": 0, "frozen": 0}
    for chunk in model_state(chunks).values():
        for value in chunk.values():
            if not isinstance(value, ShardedTensor | ShardedTensorFactory):
                continue
            pieces = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            for piece in pieces:
                if is_main_replica(piece.replica_id) and not piece.key.endswith("_extra_state"):
                    counts["trainable" if value.data.requires_grad else "frozen"] += piece.data.numel()
    totals = torch.tensor(list(counts.values()), dtype=torch.int64, device=process_groups.device())
    dist.all_reduce(totals)
    return dict(zip(counts, totals.tolist(), strict=True))
