"""Opens a GGUF model, stored in one or several files, and reads its metadata.

Requires the package `gguf`, which the extra `models` installs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


class GGUFMetadata(Mapping[str, Any]):
    """The metadata of a GGUF model: Python values by key, such as `llama.block_count`.

    An array is converted only when it is accessed, because converting a vocabulary takes a second.

    Args:
        path: the model's file, or any one of its files if the model is split.

    Raises:
        FileNotFoundError: a file of a split model is missing.
        ValueError: a file is damaged or not in the GGUF format, or the package `gguf` is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.readers = [_open(self.path)]
        count = self.get("split.count", 1)
        if count > 1:
            self.readers = [_open(file) for file in _split_files(self.path, count)]

    def __getitem__(self, key: str) -> Any:
        return self.readers[0].fields[key].contents()

    def __iter__(self) -> Any:
        return iter(self.readers[0].fields)

    def __len__(self) -> int:
        return len(self.readers[0].fields)

    @property
    def architecture(self) -> str:
        """Value of `general.architecture`, the prefix of the keys that describe the model."""
        return str(self.require("general.architecture"))

    def require(self, key: str) -> Any:
        """Returns the value of a key.

        Raises:
            ValueError: the key is missing.
        """
        if key not in self:
            raise ValueError(f"--model-dir {self.path}: the metadata has no {key}")
        return self[key]

    def of_model(self, name: str, default: Any) -> Any:
        """Returns the value of `{architecture}.{name}`, or `default` if the file does not have it."""
        return self.get(f"{self.architecture}.{name}", default)


def is_gguf(path: str | Path) -> bool:
    """Returns whether the path names a file in the GGUF format, by its name or by its first bytes."""
    file = Path(path)
    if not file.is_file():
        return False
    if file.suffix.lower() == SUFFIX:
        return True
    with file.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError(
            f"--model-dir {path}: reading GGUF files requires the package gguf; "
            'install it with: pip install "megatron-ext[models]"'
        ) from None
    with path.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(
                f"--model-dir {path}: is not a GGUF file (it does not begin with the letters GGUF)"
            )
    try:
        return GGUFReader(str(path))
    except Exception as error:  # the package lets numpy's and struct's errors through
        raise ValueError(
            f"--model-dir {path}: is damaged, incomplete, or of an unknown GGUF version ({error})"
        ) from None


def _split_files(path: Path, count: int) -> list[Path]:
    """Returns all files of a split model, in order; they are named `NAME-00001-of-00003.gguf`."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", path.stem)
    if match is None or int(match[2]) != count:
        raise ValueError(
            f"--model-dir {path}: is one of {count} files, but its name does not end in -0000N-of-{count:05d}{SUFFIX}; "
            "the other files cannot be found"
        )
    files = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}{SUFFIX}") for i in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"--model-dir {path}: other files of this model are missing in its directory: {', '.join(missing)}"
        )
    return files
