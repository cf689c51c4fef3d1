"""The memory that holds per-layer tables and their optimizer state: the device's, the host's, or files.

With --per-layer-offload, tables and state are CPU tensors, and a step moves only its own rows: `fetch` copies them to
the device, the step computes there as usual, and `write` copies them back. The data-parallel ranks of a host share
one copy of tables and state. All of them compute every update, and the first of them writes it. No rank reads rows
while another rank writes them, because two collectives are in between: the reduction of the gradients, between a
`fetch` and the `write` of the same step; and the exchange of the next step's ids, between this `write` and the next
`fetch`.
"""

import resource
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ext.platform import process_groups
from megatron_ext.platform.memory.mapped_tensors import mapped_zeros, read_ahead, release_pages

_ROWS_AT_ONCE = 1024
"""Number of rows to read before their pages are released. (When a page in the system's cache is read, Linux makes up
to 15 pages around it resident.)
"""


class TableMemory:
    """Keeps tables and state in the device's memory; also the base class of `OffDevice`."""

    is_on_device = True
    """Whether tables and state are in the device's memory."""

    is_writer = True
    """Whether this rank writes; of several ranks that share the memory, only one does."""

    def zeros(self, number: int, shape: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """Returns new tensors, filled with zeros."""
        return [torch.zeros(*shape, dtype=dtype, device=process_groups.device()) for _ in range(number)]

    def fetch(self, tables: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
        """Copies rows out of L tables [Vp, q]; returns [L, m, q] on the device."""
        return torch.stack([table.index_select(0, places) for table in tables])

    def write(self, tables: Sequence[torch.Tensor], places: torch.Tensor, rows: torch.Tensor) -> None:
        """Writes rows [L, m, q] into L tables [Vp, q], in the tables' precision."""
        for table, of_table in zip(tables, rows, strict=True):
            table.index_copy_(0, places, of_table.to(table.dtype))

    def to_look_up(
        self, ids: torch.Tensor, tables: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns ids and tables on the device that `combination.look_up` can use in place of `ids` and `tables`."""
        return ids, list(tables)

    def release(self) -> None:
        """Releases memory that the process does not need after a pass over a table."""

    def settle(self) -> None:
        """Waits until all ranks can read everything that was written. Collective."""


class OffDevice(TableMemory):
    """The host's memory or, with a directory, files; the data-parallel ranks of a host share them."""

    is_on_device = False

    def __init__(self, directory: str | None, group: dist.ProcessGroup, needed: float) -> None:
        """Args:
        directory: the directory of the files; None for host memory.
        group: the data-parallel ranks, which all hold the same tables.
        needed: bytes of this rank's tables and their optimizer state, for error messages.
        """
        self.directory = directory
        self.group = group
        self.needed = needed
        self._blocks_read = -1

    def zeros(self, number: int, shape: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """See the base class. Collective over all ranks; raises `OSError` if there is not enough space."""
        what = "--per-layer-offload-dir" if self.directory is not None else "--per-layer-offload cpu"
        need = f"the tables and their optimizer state take {self.needed / 2**20:,.0f} MiB on each rank"
        made = mapped_zeros(
            number, shape, dtype, directory=self.directory, group=self.group, what=what, need=need
        )
        self.is_writer = made.is_writer
        return made.tensors

    def fetch(self, tables: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
        """See the base class; `places` may be on the device. The host does not wait for the copy to the device."""
        device, places = places.device, places.to("cpu")
        shape = (len(tables), places.numel(), tables[0].size(1))
        rows = torch.empty(shape, dtype=tables[0].dtype, pin_memory=device.type == "cuda")
        if self._reads_disk():
            for table in tables:
                read_ahead(table, places)
        for table, of_table in zip(tables, rows, strict=True):
            for some, part in zip(places.split(_ROWS_AT_ONCE), of_table.split(_ROWS_AT_ONCE), strict=True):
                torch.index_select(table, 0, some, out=part)
                self.release()
        return rows.to(device, non_blocking=True)

    def _reads_disk(self) -> bool:
        """Returns whether this process has read from a disk since the last call; if so, the cache may lack other
        rows, too.
        """
        before, self._blocks_read = self._blocks_read, resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        return self.directory is not None and self._blocks_read != before

    def write(self, tables: Sequence[torch.Tensor], places: torch.Tensor, rows: torch.Tensor) -> None:
        """See the base class; only the host's first rank writes. On a GPU the host waits for the step."""
        if self.is_writer:
            super().write(tables, places.to("cpu"), rows.to("cpu"))
        self.release()

    def to_look_up(
        self, ids: torch.Tensor, tables: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As in the base class."""
        places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return places, list(self.fetch(tables, ids.reshape(-1)))

    def release(self) -> None:
        """As in the base class."""
        release_pages()

    def settle(self) -> None:
        """As in the base class."""
        self.release()
        dist.barrier(group=self.group)
