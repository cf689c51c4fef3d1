"""Reads tensors, or parts of them, from a checkpoint in torch's distributed format, without a process group.

`.metadata` lists the chunks of every tensor with their files. A chunk is read when a caller requests a region that
overlaps it. No module that the files name is imported, and the chunks are loaded with `weights_only=True`.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.interop.megatron.inert_pickle import read_pickle, read_torch_bytes

METADATA = ".metadata"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Chunk:
    offset: Shape
    size: Shape
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor in a checkpoint, and the files and offsets of its parts."""

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class TorchDistFiles:
    """The tensors of one checkpoint by name.

    Args:
        folder: the checkpoint's directory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA).is_file():
            raise FileNotFoundError(
                f"{folder / METADATA}: the file is missing; copy the whole directory again"
            )
        metadata = read_pickle(folder / METADATA)
        try:
            self.tensors = dict(_stored(metadata))
            self.objects = {
                index.fqn: place
                for index, place in metadata.storage_data.items()
                if index.fqn not in self.tensors
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / METADATA}: is not the metadata of a torch_dist checkpoint ({error})"
            ) from None
        self._check_files(metadata.storage_data.values())

    def _check_files(self, parts: Any) -> None:
        needed: dict[str, int] = {}
        for part in parts:
            if getattr(part, "transform_descriptors", None):
                raise ValueError(
                    f"{self.folder}: its tensors are compressed; save the checkpoint without compression"
                )
            needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
        for name, size in sorted(needed.items()):
            path = self.folder / name
            if "/" in name or not path.is_file():
                raise FileNotFoundError(f"{path}: the file is missing; copy the whole directory again")
            if path.stat().st_size < size:
                raise ValueError(
                    f"{path}: has {path.stat().st_size} bytes instead of {size}; the checkpoint is damaged"
                )

    def read(self, name: str, start: Shape | None = None, size: Shape | None = None) -> torch.Tensor:
        """Reads a region of a tensor; by default all of it.

        Args:
            name: the tensor's name in the checkpoint.
            start: index of the region's first element.
            size: the region's shape.

        Raises:
            ValueError: a file is damaged, or the checkpoint lacks a part of the region.
        """
        stored = self.tensors[name]
        start = (0,) * len(stored.shape) if start is None else start
        size = stored.shape if size is None else size
        result = torch.empty(size, dtype=stored.dtype)
        filled = 0
        for chunk in stored.chunks:
            overlap = _overlap(start, size, chunk)
            if overlap is not None:
                target, source = overlap
                part = self._load(name, chunk)[source]
                result[target] = part
                filled += part.numel()
        if filled != result.numel():
            raise ValueError(
                f"{self.folder}: holds {filled:,} of the {result.numel():,} values of {name} that are needed; the "
                "checkpoint is damaged"
            )
        return result

    def read_object(self, name: str) -> Any:
        """Reads an object that is not a tensor, such as parameter groups, without importing the modules that it
        names.
        """
        place = self.objects[name]
        path = self.folder / place.relative_path
        with open(path, "rb") as file:
            file.seek(place.offset)
            return read_torch_bytes(io.BytesIO(file.read(place.length)), path)

    def _load(self, name: str, chunk: _Chunk) -> torch.Tensor:
        path = self.folder / chunk.file
        with open(path, "rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.length)
        try:
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if tuple(tensor.shape) != chunk.size:
                raise ValueError(f"shape {list(tensor.shape)} instead of {list(chunk.size)}")
        except Exception as error:  # damaged bytes may cause any exception
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path}: {name} cannot be read; the file is damaged ({reason})") from None
        loaded: torch.Tensor = tensor
        return loaded


def _stored(metadata: Any) -> Iterator[tuple[str, StoredTensor]]:
    places: dict[tuple[str, Shape], Any] = {}
    for index, place in metadata.storage_data.items():
        places[index.fqn, tuple(getattr(index, "offset", None) or ())] = place
    for name, stored in metadata.state_dict_metadata.items():
        if not hasattr(stored, "chunks"):
            continue  # an object, such as `_extra_state`
        # A part that several ranks hold is listed several times.
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}
        parts = [(offset, size, places[name, offset]) for offset, size in chunks.items()]
        yield (
            name,
            StoredTensor(
                tuple(stored.size),
                _dtype(stored.properties),
                tuple(
                    _Chunk(offset, size, place.relative_path, place.offset, place.length)
                    for offset, size, place in parts
                ),
            ),
        )


def _dtype(properties: Any) -> torch.dtype:
    # torch's class pickles itself as a tuple that begins with the dtype.
    dtype = properties.inert_state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor has no dtype")
    return dtype


def _overlap(start: Shape, size: Shape, chunk: _Chunk) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Returns where a chunk's overlap with a region lies in the region and in the chunk; None without an overlap."""
    low = [max(pair) for pair in zip(start, chunk.offset, strict=True)]
    ends = zip(start, size, chunk.offset, chunk.size, strict=True)
    high = [min(a + n, b + m) for a, n, b, m in ends]
    if math.prod(max(0, h - lo) for lo, h in zip(low, high, strict=True)) == 0:
        return None
    spans = [(lo, h) for lo, h in zip(low, high, strict=True)]
    target = tuple(slice(lo - a, h - a) for (lo, h), a in zip(spans, start, strict=True))
    source = tuple(slice(lo - b, h - b) for (lo, h), b in zip(spans, chunk.offset, strict=True))
    return target, source
