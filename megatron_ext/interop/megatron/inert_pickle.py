"""Reads the pickled files of another program's checkpoint without importing the modules that they name.

Every class and function that a file names is replaced by `Inert`, which keeps the attributes it is given and does
nothing else. Numbers, texts, lists, dicts and tensors are read unchanged.
"""

import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

_CONTAINERS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


class Inert:
    """Stands for an object of a foreign class."""

    inert_state: Any = None
    """The pickled state, if the object's class does not pickle its attributes by name."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return None

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.inert_state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        return None

    def append(self, value: Any) -> None:
        """Ignores an item of a foreign list."""

    def extend(self, values: Any) -> None:
        """Ignores items of a foreign list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else Inert


def read_pickle(path: Path) -> Any:
    """Reads a pickled file.

    Raises:
        ValueError: the file is damaged.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _Unpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # damaged bytes may cause any exception
            raise ValueError(f"{path}: cannot be read; the file is damaged ({error})") from None


def read_torch_file(path: Path) -> Any:
    """Reads a file that `torch.save` wrote; its tensors are loaded to the CPU.

    Raises:
        ValueError: the file is damaged, or contains something that cannot be read safely.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return read_torch_bytes(file, path)


def read_torch_bytes(file: BinaryIO, path: Path) -> Any:
    """Like `read_torch_file`, for an open file; error messages name `path`."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{path}: cannot be read; the file is truncated or not written by torch.save")
    try:
        # With `weights_only`, torch imports nothing either; a name that torch does not know is replaced by `Inert`.
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
        foreign: list[Any] = [(Inert, name) for name in names]
        with torch.serialization.safe_globals(foreign):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: cannot be read; the file is damaged ({reason})") from None
