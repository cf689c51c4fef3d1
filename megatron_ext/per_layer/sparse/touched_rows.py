"""Finds the rows that a step looks up."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ext.per_layer.sparse.row_blocks import RowBlocks
from megatron_ext.platform import host_copy


def touched_rows(ids: Sequence[torch.Tensor], blocks: RowBlocks) -> tuple[torch.Tensor, list[int]]:
    """Finds the ids that occur in a step's micro-batches on any data-parallel rank. Collective.

    The host waits for the device once, because the number of distinct ids depends on their values.

    Args:
        ids: the per-layer ids of this rank's micro-batches; every rank has the same number of them.
        blocks: the division of the rows.

    Returns:
        The distinct ids, ascending, [n]; and for every block, the number of these ids that are in this block or an
        earlier one.
    """
    found = torch.cat([each.reshape(-1) for each in ids])
    ranks = blocks.group.size()
    if ranks > 1:
        of_ranks = [torch.empty_like(found) for _ in range(ranks)]
        dist.all_gather(of_ranks, found, group=blocks.group)
        found = torch.cat(of_ranks)
    # `unique` is not used, because the host would wait for n before it could compute the parts of the blocks.
    ordered = found.sort().values
    places = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    rows = torch.full_like(ordered, blocks.rows).scatter_(0, places, ordered)
    most = min(rows.numel(), blocks.rows)
    ends = (torch.arange(1, blocks.number + 1, device=rows.device) * blocks.size).clamp(max=blocks.rows)
    below = host_copy.read_sizes(
        torch.searchsorted(rows, ends),
        [most * block // blocks.number for block in range(1, blocks.number + 1)],
    )
    return rows[: below[-1]], below
