"""Appends the shards of a preprocessing run, in order, to the files of its datasets.

A shard holds the tokenized documents of one chunk of the input. It is appended as soon as it and all shards before it
are complete, and then removed, so that the disk holds the tokens only once. After every append, `state.json` records
the length of each file; a resumed run first truncates the files to these lengths. The columns of the index (lengths and
document ends, see `indexed_files.py`) are on disk too, so memory does not grow with the dataset.

With P > 1 partitions document i goes to part i mod P, and the parts are joined at the end.
"""

import dataclasses
import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_ext.data.indexed.indexed_files import bin_path, chunks, idx_path, map_column, write_index
from megatron_ext.data.preprocess.shards import ShardInfo, remove_shard, shard_path
from megatron_ext.data.readers import TextSource

_Column = npt.NDArray[np.integer]
_COPY_UNSUPPORTED = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)


@dataclass
class State:
    """Records how many shards of a run have been appended to its datasets.

    Attributes:
        next_shard: number of the first shard that has not been appended.
        totals: counts over all appended shards.
        source_index: number of the source (input file) that the last appended shard came from.
        source_lines: number of lines of that source appended so far.
        sizes: maps the name of each file in the working directory to its size in bytes.
    """

    next_shard: int = 0
    totals: ShardInfo = field(default_factory=ShardInfo)
    source_index: int = 0
    source_lines: int = 0
    sizes: dict[str, int] = field(default_factory=dict)


def load_state(directory: Path, num_keys: int) -> State:
    """Reads the state of a working directory; returns an empty state if nothing has been appended."""
    path = directory / "state.json"
    if not path.is_file():
        return State(totals=ShardInfo(tokens=[0] * num_keys, empty=[0] * num_keys))
    content = json.loads(path.read_text(encoding="utf-8"))
    return State(**{**content, "totals": ShardInfo(**content["totals"])})


class Assembly:
    """The growing datasets in a working directory.

    Args:
        directory: the working directory.
        num_keys: number of datasets, one for each key.
        partitions: number of parts of each dataset.
        sources: the input files, named in the report on rejected lines.

    Raises:
        ValueError: a file is shorter than the killed run recorded.
    """

    REJECTED = "rejected.jsonl"
    QUARANTINED = "quarantined.jsonl"

    def __init__(self, directory: Path, num_keys: int, partitions: int, sources: list[TextSource]) -> None:
        self._directory = directory
        self._num_keys, self._partitions = num_keys, partitions
        self._sources = sources
        self.state = load_state(directory, num_keys)
        self._cut_back()

    def _cut_back(self) -> None:
        """Truncates every file to the length that the state records."""
        for name in self._names():
            path = self._directory / name
            recorded = self.state.sizes.setdefault(name, 0)
            if path.exists() and path.stat().st_size < recorded or not path.exists() and recorded:
                raise ValueError(
                    f"--resume: {path} is shorter than recorded; remove {self._directory} and start again"
                )
            with open(path, "ab") as file:
                file.truncate(recorded)

    def _names(self) -> list[str]:
        parts = [(k, p) for k in range(self._num_keys) for p in range(self._partitions)]
        columns = [f"out-{k}-{p}.{column}" for k, p in parts for column in ("bin", "lengths", "documents")]
        return [*columns, self.REJECTED, self.QUARANTINED]

    def append(self, info: ShardInfo, source_index: int) -> None:
        """Appends shard number `state.next_shard` to the datasets, then removes its files."""
        state, index = self.state, self.state.next_shard
        for key in range(self._num_keys):
            self._append_tokens(index, key)
        if source_index != state.source_index:
            state.source_index, state.source_lines = source_index, 0
        self._append_rejects(index, info)
        state.source_lines += info.lines
        for name in ("documents", "skipped_empty", "lines", "blank", "rejected", "text_bytes", "input_bytes"):
            setattr(state.totals, name, getattr(state.totals, name) + getattr(info, name))
        for key in range(self._num_keys):
            state.totals.tokens[key] += info.tokens[key]
            state.totals.empty[key] += info.empty[key]
        state.next_shard += 1
        temporary = self._directory / "state.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")
        os.replace(temporary, self._directory / "state.json")
        remove_shard(str(self._directory), index)

    def _append_tokens(self, index: int, key: int) -> None:
        bin_file = shard_path(str(self._directory), index, f"{key}.bin")
        lengths, counts = (
            np.fromfile(shard_path(str(self._directory), index, f"{key}.{column}"), dtype="<i4")
            for column in ("lengths", "counts")
        )
        if self._partitions == 1:
            with self._appending(f"out-{key}-0.bin") as out, open(bin_file, "rb") as shard:
                copy_bytes(shard, out)
            self._append_columns(f"out-{key}-0", lengths, counts)
            return
        total = int(lengths.sum())
        tokens = (
            np.fromfile(bin_file, dtype=np.uint8).reshape(total, -1) if total else np.zeros((0, 1), np.uint8)
        )
        part_of_document = (self.state.totals.documents + np.arange(len(counts))) % self._partitions
        part_of_sequence = np.repeat(part_of_document, counts)
        part_of_token = np.repeat(part_of_sequence, lengths)
        for part in range(self._partitions):
            with self._appending(f"out-{key}-{part}.bin") as out:
                out.write(tokens[part_of_token == part].tobytes())
            self._append_columns(
                f"out-{key}-{part}", lengths[part_of_sequence == part], counts[part_of_document == part]
            )

    def _append_columns(self, name: str, lengths: _Column, counts: _Column) -> None:
        """Appends the length of every sequence and the end of every document; `counts` is the number of sequences per
        document.
        """
        sequences = self.state.sizes[f"{name}.lengths"] // 4
        with self._appending(f"{name}.lengths") as out:
            out.write(lengths.astype("<i4").tobytes())
        with self._appending(f"{name}.documents") as out:
            out.write((sequences + np.cumsum(counts, dtype="<i8")).tobytes())

    def _append_rejects(self, index: int, info: ShardInfo) -> None:
        if "rejects" in info.files:
            path = self._sources[self.state.source_index].path
            report = shard_path(str(self._directory), index, "rejects")
            with self._appending(self.REJECTED) as out, open(report, "rb") as lines:
                for line, offset, reason in map(json.loads, lines):
                    place = {"file": path, "line": self.state.source_lines + line + 1, "byte_offset": offset}
                    out.write(json.dumps({**place, "reason": reason}).encode() + b"\n")
        if "raw" in info.files:
            raw = shard_path(str(self._directory), index, "raw")
            with self._appending(self.QUARANTINED) as out, open(raw, "rb") as lines:
                copy_bytes(lines, out)

    def _appending(self, name: str) -> "_Appending":
        return _Appending(self._directory / name, self.state.sizes)

    def finish(self, dtype: str) -> list[str]:
        """Writes the index of every dataset; returns, for each key, the prefix of the complete `.bin` and `.idx`."""
        return [self._finish_key(key, dtype) for key in range(self._num_keys)]

    def _finish_key(self, key: int, dtype: str) -> str:
        names = [f"out-{key}-{part}" for part in range(self._partitions)]
        lengths, documents = (
            self._directory / f"final-{key}.lengths",
            self._directory / f"final-{key}.documents",
        )
        prefix = str(self._directory / (names[0] if self._partitions == 1 else f"final-{key}"))
        if self._partitions > 1:
            self._join([self._directory / f"{name}.bin" for name in names], Path(bin_path(prefix)))
        self._join([self._directory / f"{name}.lengths" for name in names], lengths)
        sequences = 0
        with open(documents, "wb") as out:
            out.write(bytes(8))
            for name in names:
                ends = map_column(self._directory / f"{name}.documents", "<i8")
                for begin, end in chunks(len(ends)):
                    out.write((ends[begin:end] + sequences).tobytes())
                sequences += self.state.sizes[f"{name}.lengths"] // 4
        with open(bin_path(prefix), "rb") as file:
            os.fsync(file.fileno())
        write_index(
            idx_path(prefix), np.dtype(dtype), map_column(lengths, "<i4"), map_column(documents, "<i8")
        )
        return prefix

    @staticmethod
    def _join(parts: list[Path], target: Path) -> None:
        with open(target, "wb") as out:
            for part in parts:
                with open(part, "rb") as file:
                    copy_bytes(file, out)


class _Appending:
    """Opens a file for appending, and records its size when it is closed."""

    def __init__(self, path: Path, sizes: dict[str, int]) -> None:
        self._path, self._sizes = path, sizes

    def __enter__(self) -> BinaryIO:
        # Not mode "ab": copy_file_range refuses a file that is open for appending.
        self._file: BinaryIO = open(self._path, "r+b")
        self._file.seek(0, os.SEEK_END)
        return self._file

    def __exit__(self, *exception: object) -> None:
        self._file.seek(0, os.SEEK_END)
        size = self._file.tell()
        self._file.close()
        self._sizes[self._path.name] = size


def copy_bytes(source: BinaryIO, target: BinaryIO) -> None:
    """Copies the rest of one file to another, inside the kernel if possible."""
    target.flush()
    remaining = os.fstat(source.fileno()).st_size - source.tell()
    position = source.tell()
    try:
        while remaining > 0 and hasattr(os, "copy_file_range"):
            copied = os.copy_file_range(source.fileno(), target.fileno(), remaining)
            if copied == 0:
                break
            remaining -= copied
            position += copied
    except OSError as error:
        if error.errno not in _COPY_UNSUPPORTED:
            raise
    if remaining > 0:
        source.seek(position)
        target.seek(0, os.SEEK_END)
        shutil.copyfileobj(source, target, 1 << 20)
