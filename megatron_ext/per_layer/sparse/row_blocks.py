"""Divides the tables' rows among data-parallel ranks: one block of consecutive rows for each rank.

With the distributed optimizer a rank has main weights and optimizer state only for its own block, and only this rank
updates the block. Otherwise there is a single block with all rows, which every rank has. L tables, q columns on this
rank.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist


class RowBlocks:
    """The blocks of tables with Vp rows."""

    def __init__(
        self, rows: int, group: dist.ProcessGroup, host_group: dist.ProcessGroup, *, divides: bool
    ) -> None:
        """Args:
        rows: Vp.
        group: the data-parallel ranks.
        host_group: the same ranks; its collectives take tensors in CPU memory.
        divides: whether rows are divided; if not, every rank has all rows.
        """
        self.rows, self.group, self.host_group = rows, group, host_group
        self.number, self.place = (group.size(), group.rank()) if divides else (1, 0)
        self.size = -(-rows // self.number)
        self.start, self.end = (min(block * self.size, rows) for block in (self.place, self.place + 1))

    def own(self, below: Sequence[int]) -> slice:
        """Returns the slice of the step's ids that are in this rank's block.

        Args:
            below: for every block, the number of ids in it and in earlier blocks, from `touched_rows`.
        """
        return slice(below[self.place - 1] if self.place else 0, below[self.place])

    def gather(self, own: torch.Tensor, below: Sequence[int]) -> torch.Tensor:
        """Gathers the rows of the step's ids from all blocks: [L, m, q] on each rank -> [L, n, q]. Collective."""
        if self.number == 1:
            return own
        counts = [end - start for start, end in pairwise((0, *below))]
        padded = own.new_zeros(own.size(0), max(counts), own.size(2))
        padded[:, : own.size(1)] = own
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded, group=self.group)
        return torch.cat([piece[:, :count] for piece, count in zip(pieces, counts, strict=True)], dim=1)

    def complete(self, table: torch.Tensor) -> None:
        """Copies the rows of all other blocks from their ranks into `table`, [Vp, q]. Collective."""
        if self.number == 1:
            return
        pieces = self._pieces(table[self.start : self.end])
        dist.all_gather(pieces, self._padded(table[self.start : self.end]), group=self.group)
        table.copy_(torch.cat(pieces)[: self.rows])

    def gather_to_first(self, own: torch.Tensor) -> torch.Tensor | None:
        """Joins the blocks of a tensor in CPU memory; returns [Vp, columns] on the first rank and None on the others.
        Collective.

        If rows are not divided, returns `own` on every rank.
        """
        if self.number == 1:
            return own
        own = own.cpu()
        pieces = self._pieces(own) if self.host_group.rank() == 0 else None
        first = dist.get_process_group_ranks(self.host_group)[0]
        dist.gather(self._padded(own), pieces, dst=first, group=self.host_group)
        return torch.cat(pieces)[: self.rows] if pieces is not None else None

    def _padded(self, own: torch.Tensor) -> torch.Tensor:
        padded = own.new_zeros(self.size, own.size(1))
        padded[: len(own)] = own
        return padded

    def _pieces(self, own: torch.Tensor) -> list[torch.Tensor]:
        return [own.new_empty(self.size, own.size(1)) for _ in range(self.number)]
