"""Reads and writes the safetensors files of a Hugging Face directory: one file, or several with an index.

A tensor is read only when it is accessed, and the size of a written file is limited. Therefore reading needs memory
for one tensor, and writing needs memory for one file, however large the model is. Pickled weights
(`pytorch_model.bin`) are not supported.
"""

import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_ext.config.groups.model_config import ModelConfig
from megatron_ext.interop.formats.directory_diagnosis import (
    check_no_pointer,
    describe_missing,
    other_names,
    what_is_there,
)
from megatron_ext.interop.formats.weight_layout import Entry, Shape, join, with_padding
from megatron_ext.training.checkpoint.checkpoint_files import write_safetensors_file

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Group = tuple[list[tuple[str, int]], Callable[[], list[torch.Tensor]]]
"""Tensors that are written together: a list of (name, size in bytes), and a function that reads all of them."""

_READ_AS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32}
"""Maps the dtype in a file to the dtype after reading. Training uses fp32 or bf16, so fp16 is converted to fp32,
without rounding.
"""


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """Reads the config.json of a directory.

    Raises:
        FileNotFoundError: there is no config.json; the message says what the directory holds, if that is known.
        ValueError: config.json is not a JSON object.
    """
    folder = Path(model_dir)
    if folder.is_file():
        raise NotADirectoryError(
            f"--model-dir {model_dir}: is a file; give a Hugging Face directory or a GGUF file"
        )
    if not folder.is_dir():
        what = "file or directory" if folder.suffix.lower() == ".gguf" else "directory"
        raise FileNotFoundError(
            f"--model-dir {model_dir}: no such {what}; download the model first (hub names are not looked up)"
        )
    there = None if (folder / CONFIG).is_file() else what_is_there(folder)
    return read_object(
        folder / CONFIG, f"--model-dir {model_dir}: no config.json in it" + (f"; {there}" if there else "")
    )


def read_object(path: Path, missing: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: path of the JSON file.
        missing: error message to raise if the file does not exist.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(missing)
    check_no_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return value


class TensorFiles(Protocol):
    """A model's tensors in files, by their Hugging Face names; a tensor is read when it is accessed."""

    folder: Path
    """The path that the user gave: a directory, or a single GGUF file."""

    described_in: str
    """Name of the file or part that describes the model, such as config.json; used in error messages."""

    @property
    def names(self) -> set[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor: ...

    def read_slice(self, name: str, dim: int, start: int, size: int) -> torch.Tensor: ...


class SafetensorsFiles:
    """The tensors in a directory's safetensors files, by name; the constructor reads the headers of all files.

    Raises:
        FileNotFoundError: there are no safetensors files, or one is missing.
        ValueError: a file is damaged, or the index does not match the files.
    """

    described_in = CONFIG

    def __init__(self, model_dir: str | Path) -> None:
        # No file stays open between reads, because its mapped pages would count as memory in use.
        self.folder = Path(model_dir)
        self._headers: dict[str, tuple[Shape, str]] = {}
        self._file_of: dict[str, str] = {}
        index = self.folder / INDEX
        listed = _indexed_files(index) if index.is_file() else [SINGLE_FILE]
        self._check_present(listed)
        for file in listed:
            self._open(file)
        if index.is_file():
            self._check_index(read_object(index, "")["weight_map"])

    def _check_present(self, listed: list[str]) -> None:
        missing = [file for file in listed if not (self.folder / file).is_file()]
        if not missing:
            return
        what = describe_missing(self.folder / missing[0])
        if listed == [SINGLE_FILE] and not (self.folder / SINGLE_FILE).is_symlink():
            there = what_is_there(self.folder)
            what = f"neither {SINGLE_FILE} nor {INDEX} in it" + (f"; {there}" if there else "")
        elif len(listed) > 1:
            what += (
                f" (in all, {len(missing)} of the {len(listed)} files listed in {INDEX} are missing); "
                "copy the whole directory again"
            )
        raise FileNotFoundError(f"--model-dir {self.folder}: {what}")

    def _open(self, file: str) -> None:
        path = self.folder / file
        check_no_pointer(path)
        try:
            with safe_open(str(path), framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
                headers = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: is damaged or not a safetensors file ({error})") from None
        for name, header in headers.items():
            if name in self._file_of:
                raise ValueError(f"{path}: holds {name}, which is also in {self._file_of[name]}")
            self._file_of[name], self._headers[name] = file, header

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for name in sorted(set(weight_map) | set(self._file_of)):
            listed, found = weight_map.get(name), self._file_of.get(name)
            if listed != found:
                where = f"is in {found}" if found else "is in no file"
                raise ValueError(
                    f"{self.folder / INDEX}: {name} {where}, but the index "
                    + (f"says {listed}" if listed else "does not list it")
                )

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> Shape:
        """Returns the shape of a tensor, from the file's header."""
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which `read` returns a tensor.

        Raises:
            ValueError: the dtype in the file is not supported.
        """
        stored = self._headers[name][1]
        if stored not in _READ_AS:
            raise ValueError(
                f"{self.folder / self._file_of[name]}: {name} has dtype {stored}, must be one of "
                + ", ".join(_READ_AS)
            )
        return _READ_AS[stored]

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor into CPU memory, converted to the dtype that `dtype(name)` returns."""
        with safe_open(str(self.folder / self._file_of[name]), framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor.to(self.dtype(name))

    def read_integers(self, name: str) -> torch.Tensor | None:
        """Reads a tensor of integers; None if there is no such tensor.

        Raises:
            ValueError: the tensor has another dtype.
        """
        if name not in self._file_of:
            return None
        with safe_open(str(self.folder / self._file_of[name]), framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        if tensor.is_floating_point():
            raise ValueError(
                f"{self.folder / self._file_of[name]}: {name} has dtype {tensor.dtype}, must hold integers"
            )
        return tensor

    def read_slice(self, name: str, dim: int, start: int, size: int) -> torch.Tensor:
        """Like `read`, but reads only the entries `start` to `start + size - 1` of dimension `dim`."""
        with safe_open(str(self.folder / self._file_of[name]), framework="pt") as opened:
            place = (slice(None),) * dim + (slice(start, start + size),)
            tensor: torch.Tensor = opened.get_slice(name)[place]
        return tensor.to(self.dtype(name))


def _indexed_files(index: Path) -> list[str]:
    weight_map = read_object(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: has no weight_map from tensors to files")
    files = sorted({str(file) for file in weight_map.values()})
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index}: {file}: must be the name of a file in the same directory")
    return files


class HuggingFaceState(Mapping[str, torch.Tensor]):
    """A Hugging Face model's tensors under the names of a checkpoint; each is read and converted when it is accessed.

    Args:
        files: the Hugging Face tensors.
        model: configuration of the base model.
        found: result of `weight_layout.entries` for the model.
        besides: names of further tensors in the files that belong to no entry and are not read.

    Raises:
        ValueError: a tensor is missing, does not belong to the model, or has the wrong shape or dtype.
    """

    def __init__(
        self, files: TensorFiles, model: ModelConfig, found: list[Entry], besides: Collection[str] = ()
    ) -> None:
        self._files = files
        self._model = model
        self._entries = {entry.name: entry for entry in found}
        _check(files, found, besides, tied=not model.untie_embeddings_and_output_weights)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        if entry.kind == "slice":
            dim, start = entry.place
            part = self._files.read_slice(entry.parts[0][0], dim, start, entry.shape[dim])
            return with_padding(entry, part)
        return join(entry, [self._files.read(part) for part, _ in entry.parts], self._model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> Shape:
        """Returns the unsharded shape that a tensor has in a checkpoint."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype that a tensor has in a checkpoint."""
        parts = [self._files.dtype(part) for part, _ in self._entries[name].parts]
        return functools.reduce(torch.promote_types, parts)

    @property
    def precision(self) -> torch.dtype:
        """Precision for training the model: bf16 if all tensors are bf16, else fp32."""
        types = {self._files.dtype(part) for entry in self._entries.values() for part, _ in entry.parts}
        return torch.bfloat16 if types == {torch.bfloat16} else torch.float32


def _check(files: TensorFiles, found: list[Entry], besides: Collection[str], *, tied: bool) -> None:
    wanted = dict(part for entry in found for part in entry.parts)
    missing = [name for name in wanted if name not in files.names]
    unknown = files.names - set(wanted) - set(besides)
    extra = sorted(name for name in unknown if not name.endswith(".rotary_emb.inv_freq"))
    other = other_names(files.names, wanted) if missing or extra else None
    if other is not None:
        raise ValueError(f"--model-dir {files.folder}: {other}")
    if missing:
        raise ValueError(f"--model-dir {files.folder}: {_listed(missing)} missing from its tensors")
    if tied and "lm_head.weight" in extra:
        # Some tools also save the tied output layer, which is harmless if it equals the embedding.
        if not torch.equal(files.read("lm_head.weight"), files.read("model.embed_tokens.weight")):
            raise ValueError(
                f"--model-dir {files.folder}: {files.described_in} ties lm_head.weight to the embedding, "
                "but they differ"
            )
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(
            f"--model-dir {files.folder}: {_listed(extra)} not part of the model in {files.described_in}"
        )
    for name, shape in wanted.items():
        if files.shape(name) != shape:
            raise ValueError(
                f"--model-dir {files.folder}: {name} has shape {list(files.shape(name))}, "
                f"but {files.described_in} requires {list(shape)}"
            )
        files.dtype(name)


def _listed(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def write_safetensors(
    folder: Path,
    tensors: Iterable[Group],
    max_shard_size: int,
) -> list[str]:
    """Writes tensors into safetensors files of at most `max_shard_size` bytes, and an index if there are several.

    Args:
        folder: an empty directory.
        tensors: groups of tensors that are read together.
        max_shard_size: largest size of a file in bytes; a larger group gets a separate file.

    Returns:
        The names of the files.
    """
    shards: list[list[Group]] = [[]]
    size = total = 0
    for group in tensors:
        group_size = sum(part for _, part in group[0])
        if shards[-1] and size + group_size > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size, total = size + group_size, total + group_size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [SINGLE_FILE] if len(shards) == 1 else names
    weight_map: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        held: dict[str, torch.Tensor] = {}
        for parts, read in shard:
            held |= {name: tensor.contiguous() for (name, _), tensor in zip(parts, read(), strict=True)}
        weight_map |= dict.fromkeys(held, file)
        write_safetensors_file(folder / file, held, {"format": "pt"})
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names
