"""Context parallelism: each of C ranks holds two of the 2 C equal chunks of every sequence.

    rank r holds chunk r, then chunk 2 C - 1 - r

Under causal attention, a later chunk attends to more keys than an earlier one, but all of these pairs attend to
equally many keys. megatron-core uses the same order when it slices its rotary table, so a batch must be sliced in
this order.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

_SEQUENCE_DIMENSIONS = {"attention_mask": 2}
"""Dimensions along which batch fields are sliced, if not the second one: a mask [b, 1, s, s] is sliced over queries
and keeps all keys.
"""


def chunks_of_rank(rank: int, ranks: int) -> tuple[int, int]:
    """Returns the numbers of the two chunks that a rank holds."""
    return rank, 2 * ranks - 1 - rank


def positions_of_rank(length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Returns the positions [s / C] of this rank's tokens in sequences of `length` tokens."""
    return _part(torch.arange(length), 0, group)


def part_of_batch(batch: dict[str, torch.Tensor], group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Returns this rank's part of a micro-batch of whole sequences.

    Fields with one value per sequence, [b], are returned unchanged.

    Raises:
        ValueError: the length of the sequences is not divisible by 2 C.
    """
    if group.size() == 1:
        return batch
    length = batch["tokens"].size(1)
    if length % (2 * group.size()):
        raise ValueError(
            f"a sequence of {length} tokens cannot be divided by --context-parallel-size {group.size()}; its length "
            f"must be divisible by {2 * group.size()}"
        )
    return {
        name: _part(value, _SEQUENCE_DIMENSIONS.get(name, 1), group) if value.dim() > 1 else value
        for name, value in batch.items()
    }


def _part(whole: torch.Tensor, dimension: int, group: dist.ProcessGroup) -> torch.Tensor:
    chunks = whole.chunk(2 * group.size(), dimension)
    return torch.cat([chunks[number] for number in chunks_of_rank(group.rank(), group.size())], dimension)


def gather_sequence(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gathers the ranks' parts [s / C, ...] to whole sequences [s, ...], in the order of their positions. Collective.

    In the backward pass, which is collective too, the ranks' gradients of a part are summed.
    """
    ranks = group.size()
    gathered = gather_from_sequence_parallel_region(part, group=group)
    # The two chunks of rank r are at places 2 r and 2 r + 1.
    chunks = gathered.view(2 * ranks, -1, *part.shape[1:]).unbind()
    places = [
        2 * number if number < ranks else 2 * (2 * ranks - 1 - number) + 1 for number in range(2 * ranks)
    ]
    return torch.cat([chunks[place] for place in places])
