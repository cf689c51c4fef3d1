"""Where the sample indices of a run are kept, and what happens when they cannot be.

mcore writes them file by file under their final names. Here a file that a killed run left truncated is made again, an
attempt that fails (a full disk) leaves none, and where the data's directory cannot be written to nothing is kept:
every process then makes the indices in its own memory.
"""

import contextlib
import errno
import glob
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_ext.config.data import DataConfig

IN_MEMORY = ""
"""mcore's sign that no index is written."""

_Built = TypeVar("_Built")


def choose_cache(data: DataConfig, prefixes: list[str]) -> str:
    """The directory of the sample indices, or `IN_MEMORY`; collective, the first rank decides.

    Args:
        data: `--data-cache-path` is taken as it is.
        prefixes: the datasets; by default the indices lie beside the first.
    """
    chosen = [_choose(data, prefixes[0]) if _is_first() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    assert chosen[0] is not None
    if chosen[0] == IN_MEMORY:  # mcore warns of what is said already
        for name in ("gpt_dataset", "blended_dataset"):
            logging.getLogger(f"megatron.core.datasets.{name}").setLevel(logging.ERROR)
    return chosen[0]


def _choose(data: DataConfig, prefix: str) -> str:
    if data.data_cache_path is not None:
        return data.data_cache_path
    path = os.path.join(os.path.dirname(prefix), "index_cache")
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        print(
            f"note: {path}: {error.strerror}; every process makes the sample indices in its memory"
            f" (--data-cache-path DIR keeps them)"
        )
        return IN_MEMORY
    return path


def build_cached(dataset: Any, build: Callable[[], _Built]) -> _Built:
    """What mcore's `build` returns for a dataset that has its `unique_description_hash`.

    Raises:
        OSError: the indices could not be written; names the directory and the flag, and none of their files is left.
    """
    if not dataset.config.path_to_cache or not _is_first():
        return build()
    with _leaving_nothing(dataset):
        with contextlib.suppress(ValueError, EOFError):  # a truncated file
            return build()
        _forget(dataset)
        return build()


@contextlib.contextmanager
def _leaving_nothing(dataset: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _forget(dataset)
        number = error.errno or errno.ENOSPC  # numpy tells of a short write without a number
        reason = f"{os.strerror(number)}; --data-cache-path DIR keeps the sample indices elsewhere"
        raise OSError(number, reason, dataset.config.path_to_cache) from None


def _forget(dataset: Any) -> None:
    """Remove the dataset's files from the cache."""
    folder = glob.escape(dataset.config.path_to_cache)
    for path in glob.glob(os.path.join(folder, f"{dataset.unique_description_hash}-*")):
        with contextlib.suppress(OSError):
            os.unlink(path)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


class CachedBlend(BlendedDataset):
    """mcore's blend, with its index kept as above."""

    def _build_indices(self) -> Any:
        return build_cached(self, super()._build_indices)
