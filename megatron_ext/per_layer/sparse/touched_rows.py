"""Finds the rows that a step looks up."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def touched_rows(ids: Sequence[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the ids that occur in a step's micro-batches on any rank of `group`, ascending, [n]. Collective.

    The host waits for the device, because n depends on the ids.

    Args:
        ids: the per-layer ids of this rank's micro-batches.
        group: the data-parallel ranks.
    """
    own = torch.cat([each.reshape(-1) for each in ids]).unique()
    ranks = group.size()
    if ranks == 1:
        return own
    count = torch.tensor([own.numel()], device=own.device)
    counts = [torch.empty_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count, group=group)
    sizes = torch.cat(counts).tolist()
    padded = own.new_zeros(max(sizes))
    padded[: own.numel()] = own
    of_ranks = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(of_ranks, padded, group=group)
    return torch.cat([each[:size] for each, size in zip(of_ranks, sizes, strict=True)]).unique()
