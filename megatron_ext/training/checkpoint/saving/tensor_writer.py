"""Writes one rank's tensors of a checkpoint in megatron-core's `torch_dist` format.

megatron-core's own writer is not used: it starts a process manager and forks, which takes seconds for a tiny model,
does not work in daemonic processes, leaves the manager running if the rank is killed, and makes the other ranks hang
when rank 0's disk is full. Only the planning is megatron-core's. torch's writer then writes the same files in this
process, either from the tensors or from copies; a background thread may write copies while training changes the
tensors.
"""

import io
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from megatron_ext.platform.collectives import is_first_rank, on_every_rank
from megatron_ext.platform.memory.mapped_tensors import release_pages
from megatron_ext.training.checkpoint import checkpoint_files as files
from megatron_ext.training.checkpoint.saving.hashed_file import HashedFile

Digests = dict[str, dict[str, Any]]
"""Maps the names of files to their sha256 and size, as listed in the manifest."""


Read = Callable[[str, tuple[int, ...]], torch.Tensor]
"""A function that returns a new tensor, given its global name and the offset in the global tensor; the tensor is
freed after it is written.
"""


class HostCopies:
    """Copies of tensors in host memory, pinned if the tensor is on a GPU; later saves reuse the memory."""

    def __init__(self) -> None:
        self._held: dict[Any, torch.Tensor] = {}

    def copy(self, name: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor; call `torch.cuda.synchronize` before the copy is read.

        Args:
            name: identifies the tensor from save to save.
            tensor: the tensor. Its previous copy is overwritten.
        """
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._held[name] = held
        return held.copy_(tensor, non_blocking=True)


class TensorWriter:
    """Writes this rank's tensors of one checkpoint."""

    def __init__(
        self,
        state: ShardedStateDict,
        folder: Path,
        copies: HostCopies | None = None,
        read: Read | None = None,
    ) -> None:
        """Plans the files, and writes the small ones. Collective.

        Args:
            state: the sharded state dict of model and optimizer.
            folder: the checkpoint's directory.
            copies: if given, the tensors are copied there, and `write` writes the copies.
            read: if given, the tensors of `state` are on the meta device, and `write` calls `read` for each tensor
                just before writing it.

        Raises:
            OSError: some rank could not write; raised on every rank.
        """
        self.cancelled = threading.Event()
        """Event that stops `write` in another thread."""

        self._writer = _Writer(folder, self.cancelled, copies, read)
        sharded, common = save_preprocess(state)
        groups: dict[str, list[Any]] = defaultdict(list)
        for shard in nested_values(sharded):
            if is_main_replica(shard.replica_id):
                groups[shard.unique_key if isinstance(shard, ShardedObject) else shard.key].append(shard)
        self._everyone: list[Any] = []
        self._metadata, self._ranks = self._plan(mcore_to_pyt_state_dict(groups))

        def write_small() -> None:
            if is_first_rank():
                files.write_tensors(folder / "common.pt", common)
                save_config(CheckpointingConfig("torch_dist", 1), str(folder))

        on_every_rank(write_small)

    def _plan(self, state: dict[str, Any]) -> tuple[Any, Any]:
        """Distributes the tensors over the ranks' files. Collective.

        Returns:
            Rank 0's metadata, and torch's wrapper of the process group.
        """
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        try:
            (_, metadata, ranks), *_ = save_state_dict_async_plan(state, self._writer, planner=planner)
        except torch_checkpoint.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise OSError(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__) from cause
        return metadata, ranks

    def write(self) -> Digests:
        """Writes this rank's file and flushes it to the disk; needs no other rank.

        Raises:
            OSError: the file could not be written.
        """
        return self._writer.write()

    def gather(self) -> None:
        """Sends the positions of every rank's tensors within its file to rank 0. Collective."""
        self._everyone = self._ranks.gather_object(self._writer.results) or []

    def write_metadata(self) -> Digests:
        """Writes the metadata, after `gather`; call this on rank 0 only.

        Raises:
            OSError: the file could not be written.
        """
        self._writer.finish(self._metadata, self._everyone)
        return self._writer.metadata_digest()


def write(state: ShardedStateDict, folder: Path, read: Read | None = None) -> Digests:
    """Writes all tensors of a sharded state dict, in a process group of size 1.

    Args:
        state: the sharded state dict.
        folder: the checkpoint's directory.
        read: as in `TensorWriter`.

    Returns:
        The digests of the files, except for the small `common.pt` and `metadata.json`.

    Raises:
        OSError: a file could not be written.
    """
    writer = TensorWriter(state, folder, read=read)
    digests = writer.write()
    writer.gather()
    return {**digests, **writer.write_metadata()}


class _HashedFiles(FileSystem):
    """torch's file system, with files that hash the written bytes."""

    def __init__(self, cancelled: threading.Event) -> None:
        self.cancelled = cancelled
        self.digests: Digests = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", "the writer only writes"
        with HashedFile(Path(path), self.cancelled) as file:
            yield file
            self.digests[Path(path).name] = file.digest()


class _Copied:
    """Replaces a planner in `write_data`; supplies the copied data of an item of the plan."""

    def __init__(self, data: dict[Any, Any]) -> None:
        self._data = data

    def resolve_data(self, item: WriteItem) -> Any:
        return self._data[item.index]


class _InPlace:
    """Replaces a planner in `write_data`; keeps only the pages of one mapped tensor at a time in resident memory."""

    def __init__(self, planner: SavePlanner) -> None:
        self._planner = planner

    def resolve_data(self, item: WriteItem) -> Any:
        release_pages()  # the previous tensor has been written by now
        return self._planner.resolve_data(item)


class _Reading:
    """Replaces a planner in `write_data`; reads a tensor when its data is requested."""

    def __init__(self, planner: SavePlanner, read: Read) -> None:
        self._planner, self._read = planner, read
        self._written: torch.UntypedStorage | None = None

    def resolve_data(self, item: WriteItem) -> Any:
        if item.type == WriteItemType.BYTE_IO:
            return self._planner.resolve_data(item)
        # torch's writer keeps every tensor of a file until the file is complete. The last tensor has been written, so
        # free its memory.
        if self._written is not None and self._written.resizable():
            self._written.resize_(0)
        tensor = self._read(item.index.fqn, tuple(item.index.offset or ()))
        storage = tensor.untyped_storage()
        # Copy the tensor as torch's writer would, and also if torch does not own the memory, as for a mapped file.
        if storage.nbytes() != tensor.nbytes or not storage.resizable():
            tensor = tensor.clone()
        self._written = tensor.untyped_storage()
        return tensor


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's writer, used in the steps of megatron-core's writer: plan, copy, write, finish."""

    def __init__(
        self, folder: Path, cancelled: threading.Event, copies: HostCopies | None, read: Read | None
    ) -> None:
        # Copies are already in host memory; with a limit, torch would wait for the GPU every few megabytes. If
        # tensors are read during writing, each one must be written before the next one is read.
        ahead = 10_000_000 if copies is None and read is None else 0
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=ahead)
        self.fs: _HashedFiles = _HashedFiles(cancelled)
        self.results: list[Any] = []
        self._copies, self._read = copies, read
        self._work: tuple[SavePlan, Any] | None = None

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Stores the plan; copies the tensors if they will be written while training changes them."""
        if self._copies is None:
            self._work = plan, _InPlace(planner) if self._read is None else _Reading(planner, self._read)
            return
        data: dict[Any, Any] = {item.index: planner.resolve_data(item) for item in plan.items}
        for item in plan.items:
            if item.type != WriteItemType.BYTE_IO:
                data[item.index] = self._copies.copy(item.index, data[item.index].detach())
        torch.cuda.synchronize()
        self._work = plan, _Copied(data)

    def write(self) -> Digests:
        """Writes this rank's file."""
        assert self._work is not None, "nothing is planned"
        (plan, source), self._work = self._work, None
        try:
            self.results = self.write_data(plan, source).wait()
        except RuntimeError as error:
            # torch hides the system's error ("No space left on device") behind its own `RuntimeError`.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        return dict(self.fs.digests)

    def metadata_digest(self) -> Digests:
        """Returns the digest of `.metadata`, which torch first writes under another name."""
        return {".metadata": self.fs.digests[".metadata.tmp"]}
